"""What of a text met what of a query: places to be marked, words that both have, how near the two are."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import Index

LEAST = 0.5  # product of two tokens that is worth a mark
STEM = 5  # letters by which words are compared where there are no tokens
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Mark:
    """A place in a text.

    Attributes:
        begin: Its first character.
        end: The one behind its last.
        weight: How well it fits, up to 1.
        query: What of the query it met.
    """

    begin: int
    end: int
    weight: float
    query: str


def highlight_marks(index: Index, query: str, text: str) -> list[Mark]:
    """Places in a text, in its order: by the index's tokens where it has such, or where words begin alike."""
    encoder = _tokens(index.encoder)
    if encoder is None:
        wanted = {w.lower()[:STEM]: w for w in _WORD.findall(query) if len(w) > 2}
        found = ((m, wanted.get(m[0].lower()[:STEM])) for m in _WORD.finditer(text))
        return [Mark(m.start(), m.end(), 1.0, word) for m, word in found if word]
    words, spans, products = encoder.words(query, query=True), encoder.spans(text), _products(encoder, query, text)
    best: dict[tuple[int, int], Mark] = {}
    for i, word in enumerate(words[: len(products)]):
        if not _WORD.search(word.strip("#▁")) or word.startswith("[") or not products.shape[1]:
            continue  # punctuation and what the checkpoint adds
        at = int(products[i].argmax())
        begin, end = spans[at]
        weight = float(products[i, at])
        if (
            _WORD.search(text, begin, end)
            and weight >= LEAST
            and weight > best.get((begin, end), Mark(0, 0, 0.0, "")).weight
        ):
            best[begin, end] = Mark(begin, end, min(round(weight, 3), 1.0), word)
    return [best[place] for place in sorted(best)]


def similarity(index: Index, query: str, text: str) -> float | None:
    """The mean over the query's tokens of the best product with the text's; None where the index has no tokens.

    Unlike scores of searches it can be compared between queries.
    """
    encoder = _tokens(index.encoder)
    if encoder is None:
        return None
    products = _products(encoder, query, text)
    return float(products.max(1).mean()) if products.size else None


def shared_terms(index: Index, query: str, text: str, most: int = 12) -> list[tuple[str, float]]:
    """Words of the vocabulary that query and text share, and what each adds; of indexes with VDR."""
    reading = index.kind.term_weights(index.encoder, query, text, index.settings())
    if reading is None:
        return []
    theirs = dict(reading.document)
    both = [(word, round(weight * theirs[word], 4)) for word, weight in reading.query if word in theirs]
    return sorted(both, key=lambda pair: -pair[1])[:most]


def _tokens(encoder: Any) -> Any | None:
    """The encoder that knows where its tokens stand, alone or among several."""
    each = getattr(encoder, "encoders", {"": encoder}).values()
    return next((e for e in each if hasattr(e, "spans")), None)


def _products(encoder: Any, query: str, text: str) -> NDArray[np.float32]:
    """[query tokens, text tokens]."""
    vectors = encoder.encode_documents([text])[0].vectors.astype(np.float32)
    return encoder.encode_queries([query])[0].vectors @ vectors.T
