"""Suffix arrays over token ids, sorted to a limited depth.

Drafting from a corpus needs the longest suffix of a request's text that occurs in the corpus, of at most a few tokens
(REST, arXiv 2311.08252, looks up 16 down to 2 tokens). So suffixes are compared by their first `SUFFIX_DEPTH` tokens
only, and NumPy sorts them by prefix doubling in four passes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUFFIX_DEPTH = 16  # number of tokens by which suffixes are ordered
TEXT_BREAK = -1  # separates two texts; no request contains it, so no match crosses it

Int32, UInt32 = NDArray[np.int32], NDArray[np.uint32]


class SuffixMatch(NamedTuple):
    """The occurrences of the last ``length`` tokens of a text: suffixes ``begin`` to ``end`` of a suffix array.

    Without a match, the length is 0.
    """

    length: int
    begin: int
    end: int

    @property
    def occurrences(self) -> int:
        """Number of occurrences."""
        return self.end - self.begin


def build_suffix_array(tokens: Int32) -> UInt32:
    """Return the suffixes of ``tokens`` [n], ordered by their first `SUFFIX_DEPTH` tokens, equal ones by position.

    This takes about 40 bytes of memory per token temporarily.

    Raises:
        ValueError: There are 2**32 tokens or more, or a token id is below `TEXT_BREAK`.
    """
    n = len(tokens)
    if n >= 1 << 32:
        raise ValueError(f"{n} tokens, expected at most {(1 << 32) - 1}")
    if n and tokens.min() < TEXT_BREAK:
        raise ValueError(f"token id {tokens.min()}, expected {TEXT_BREAK} or more")
    rank = tokens.astype(np.int64) - TEXT_BREAK
    compared, order = 1, np.empty(0, np.int64)
    while compared < SUFFIX_DEPTH:
        key = rank * (int(rank.max(initial=0)) + 2)
        key[: max(n - compared, 0)] += rank[compared:] + 1  # a suffix that ends earlier comes first
        compared *= 2
        order = np.argsort(key, kind="stable" if compared >= SUFFIX_DEPTH else None)
        ranked = key[order]
        rank[order] = np.concatenate(([0], np.cumsum(ranked[1:] != ranked[:-1]))) if n else order
    return order.astype(np.uint32)
