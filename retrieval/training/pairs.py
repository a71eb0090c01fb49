"""Training pairs of a query and a relevant document: from qrels, or a sentence and its passage."""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import evaluation
from ..errors import RetrievalError
from ..loaders import DocumentSource

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")
PASSAGE_SENTENCES = 5
KEEP_QUERY = 0.1  # share of passages that keep the sentence used as query (inverse cloze task, arXiv 1906.00300)
MIN_QUERY_WORDS = 5


@dataclass(frozen=True)
class Pair:
    """A query and a document that is relevant to it."""

    query: str
    document: str


def qrels_pairs(folder: Path) -> list[Pair]:
    """Read the training queries of a BEIR folder, each with every document that its qrels mark as relevant.

    Raises:
        RetrievalError: The folder has no training qrels.
    """
    if not (folder / "qrels" / "train.tsv").is_file() and (folder / "qrels" / "test.tsv").is_file():
        raise RetrievalError(f"{folder}: has no qrels/train.tsv, and test.tsv is not to be learned from")
    collection = evaluation.read_collection(folder, "train")
    documents = {d.id: d.text for d in DocumentSource([str(collection.corpus)], lambda text: [text])}
    return [
        Pair(collection.queries[q], documents[d])
        for q, grades in collection.qrels.items()
        for d, grade in grades.items()
        if grade > 0 and q in collection.queries and d in documents
    ]


def inverse_cloze_pairs(paths: Sequence[str], seed: int) -> list[Pair]:
    """Make pairs of unlabelled texts: a sentence, and the passage that it is taken from (inverse cloze task)."""
    rng = random.Random(seed)
    pairs = []
    for document in DocumentSource(list(paths), lambda text: [text], number_ids=True):
        sentences = [s for s in SENTENCE.split(" ".join(document.text.split())) if s]
        for begin in range(0, len(sentences) - 2, PASSAGE_SENTENCES):
            passage = sentences[begin : begin + PASSAGE_SENTENCES]
            place = rng.randrange(len(passage))
            rest = passage if rng.random() < KEEP_QUERY else passage[:place] + passage[place + 1 :]
            if len(passage[place].split()) >= MIN_QUERY_WORDS and rest:
                pairs.append(Pair(passage[place], " ".join(rest)))
    return pairs


def digest(pairs: Sequence[Pair]) -> str:
    """Return a hex digest of pairs in their order."""
    hashed = hashlib.sha256()
    for pair in pairs:
        hashed.update(f"{pair.query}\0{pair.document}\0".encode())
    return hashed.hexdigest()[:16]


def pair_batches(pairs: Sequence[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Yield batches without end, in a different order in each epoch; no document occurs twice in a batch.

    Raises:
        RetrievalError: There are fewer distinct documents than a batch holds.
    """
    if len({p.document for p in pairs}) < size:
        raise RetrievalError(f"{len(pairs)} pairs are too few for batches of {size}")
    epoch = 0
    while True:
        waiting = random.Random(seed * 1_000_003 + epoch).sample(list(pairs), len(pairs))
        while waiting:
            batch: dict[str, Pair] = {}
            later = []
            for i, pair in enumerate(waiting):
                if len(batch) == size:
                    later += waiting[i:]
                    break
                if pair.document in batch:
                    later.append(pair)
                else:
                    batch[pair.document] = pair
            if len(batch) < size:
                break  # the rest takes part in the next epoch
            waiting = later
            yield list(batch.values())
        epoch += 1
