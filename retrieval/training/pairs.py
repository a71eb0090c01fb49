"""Pairs of a query and a document that answers it: judged ones, or a sentence and what stands around it."""

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
AROUND = 5  # sentences of a passage
KEPT = 0.1  # of the passages keep the sentence that asks for them (inverse cloze task, arXiv 1906.00300)
FEWEST_WORDS = 5


@dataclass(frozen=True)
class Pair:
    """A query and a document that it should find."""

    query: str
    document: str


def judged_pairs(folder: Path) -> list[Pair]:
    """Of a BEIR folder: every query of its training part with every document that is judged relevant to it.

    Raises:
        RetrievalError: the folder has no such judgements, or those of its test part alone.
    """
    if not (folder / "qrels" / "train.tsv").is_file() and (folder / "qrels" / "test.tsv").is_file():
        raise RetrievalError(f"{folder}: has no qrels/train.tsv, and test.tsv is not to be learned from")
    collection = evaluation.read_collection(folder, "train")
    documents = {d.id: d.text for d in DocumentSource([str(collection.corpus)], lambda text: [text])}
    return [
        Pair(collection.queries[q], documents[d])
        for q, grades in collection.judged.items()
        for d, grade in grades.items()
        if grade > 0 and q in collection.queries and d in documents
    ]


def inverse_cloze_pairs(paths: Sequence[str], seed: int) -> list[Pair]:
    """Of any texts: a sentence, and the passage that it was taken from (inverse cloze task)."""
    rng = random.Random(seed)
    found = []
    for document in DocumentSource(list(paths), lambda text: [text], number_ids=True):
        sentences = [s for s in SENTENCE.split(" ".join(document.text.split())) if s]
        for begin in range(0, len(sentences) - 2, AROUND):
            passage = sentences[begin : begin + AROUND]
            place = rng.randrange(len(passage))
            rest = passage if rng.random() < KEPT else passage[:place] + passage[place + 1 :]
            if len(passage[place].split()) >= FEWEST_WORDS and rest:
                found.append(Pair(passage[place], " ".join(rest)))
    return found


def digest(pairs: Sequence[Pair]) -> str:
    """Of all pairs in their order."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(f"{pair.query}\0{pair.document}\0".encode())
    return found.hexdigest()[:16]


def pair_batches(pairs: Sequence[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Batches without end, in another order in each round; no document comes twice in one.

    Raises:
        RetrievalError: there are fewer different documents than a batch holds.
    """
    if len({p.document for p in pairs}) < size:
        raise RetrievalError(f"{len(pairs)} pairs are too few for batches of {size}")
    turn = 0
    while True:
        waiting = random.Random(seed * 1_000_003 + turn).sample(list(pairs), len(pairs))
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
                break  # what is left goes with the next round
            waiting = later
            yield list(batch.values())
        turn += 1
