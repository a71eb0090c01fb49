"""Matches of a query and a text: passages to highlight, shared terms, and their similarity."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import Index
from .snippets import PREFIX, query_prefixes
from .text_normalization import fold, map_fold, runs

LEAST = 0.5  # smallest similarity of two tokens that is highlighted
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Mark:
    """Highlighted passage of a text.

    Attributes:
        begin: Index of its first character.
        end: Index after its last character.
        weight: Similarity to the query token, at most 1.
        query: Query token or word that it matches.
    """

    begin: int
    end: int
    weight: float
    query: str


def highlight_marks(index: Index, query: str, text: str) -> list[Mark]:
    """Return the passages of a text that match a query, in text order.

    They are found by token similarity, or by common word prefixes if the encoder has no token vectors.
    """
    encoder = _tokens(index.encoder)
    if encoder is None:
        return _marks_of_words(query, text)
    words, spans, products = encoder.words(query, query=True), encoder.spans(text), _products(encoder, query, text)
    best: dict[tuple[int, int], Mark] = {}
    for i, word in enumerate(words[: len(products)]):
        if not _WORD.search(word.strip("#▁")) or word.startswith("[") or not products.shape[1]:
            continue  # punctuation and special tokens
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


def _marks_of_words(query: str, text: str) -> list[Mark]:
    """Return the words of a text that begin like one of the query, and its bigrams in scripts without spaces."""
    wanted, marks = query_prefixes(query), list[Mark]()
    for begin, end, unspaced in runs(text):
        if not unspaced:
            word = wanted.get(fold(text[begin:end])[:PREFIX])
            if word:
                marks.append(Mark(begin, end, 1.0, word))
            continue
        folded, positions = map_fold(text[begin:end])
        for i in range(len(folded)):
            for term in (folded[i : i + 2], folded[i : i + 1]):
                if term in wanted:
                    mark = Mark(begin + positions[i], begin + positions[i + len(term)], 1.0, wanted[term])
                    if marks and mark.begin < marks[-1].end:  # overlapping bigrams are one passage
                        first = marks.pop()
                        mark = Mark(first.begin, mark.end, 1.0, fold(text[first.begin : mark.end]))
                    marks.append(mark)
                    break
    return marks


def similarity(index: Index, query: str, text: str) -> float | None:
    """Return the mean over query tokens of the largest similarity to a text token (MaxSim).

    Unlike search scores, it can be compared between queries. The result is None if the encoder has no token vectors.
    """
    encoder = _tokens(index.encoder)
    if encoder is None:
        return None
    products = _products(encoder, query, text)
    return float(products.max(1).mean()) if products.size else None


def shared_terms(index: Index, query: str, text: str, most: int = 12) -> list[tuple[str, float]]:
    """Return the terms that query and text share, each with its contribution to the score, largest first.

    The list is empty if the index type has no terms.
    """
    term_weights = index.kind.term_weights(index.encoder, query, text, index.settings())
    if term_weights is None:
        return []
    document_weights = dict(term_weights.document)
    both = [
        (word, round(weight * document_weights[word], 4))
        for word, weight in term_weights.query
        if word in document_weights
    ]
    return sorted(both, key=lambda pair: -pair[1])[:most]


def _tokens(encoder: Any) -> Any | None:
    """Return the encoder that provides token positions, if there is one; a `MultiEncoder` is searched."""
    each = getattr(encoder, "encoders", {"": encoder}).values()
    return next((e for e in each if hasattr(e, "spans")), None)


def _products(encoder: Any, query: str, text: str) -> NDArray[np.float32]:
    """Compute the similarities of tokens, [query tokens, text tokens]."""
    vectors = encoder.encode_documents([text])[0].vectors.astype(np.float32)
    return encoder.encode_queries([query])[0].vectors @ vectors.T
