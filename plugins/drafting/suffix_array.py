"""Suffix arrays over token ids, sorted to a limited depth: where the end of a text has been seen before.

Drafting from text needs the longest suffix of a request that a corpus holds, a few tokens long at most (REST, arXiv
2311.08252, looks up 16 down to 2). So suffixes are compared by their first `DEPTH` tokens only, which numpy sorts by
prefix doubling in four passes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUFFIX_DEPTH = 16  # tokens by which suffixes are ordered
TEXT_BREAK = -1  # stands between two texts; no request holds it, so no match crosses it

Int32, UInt32 = NDArray[np.int32], NDArray[np.uint32]


class SuffixMatch(NamedTuple):
    """Where the last ``length`` tokens of a text occur: suffixes ``begin`` to ``end`` of the order; none: length 0."""

    length: int
    begin: int
    end: int

    @property
    def occurrences(self) -> int:
        """How often they occur."""
        return self.end - self.begin


def build_suffix_array(tokens: Int32) -> UInt32:
    """The suffixes of ``tokens`` [n] in the order of their first `DEPTH` tokens, equal ones by position.

    Takes about 40 bytes of memory for each token while it works.

    Raises:
        ValueError: there are more tokens than 32 bits number, or one below `BREAK`.
    """
    n = len(tokens)
    if n >= 1 << 32:
        raise ValueError(f"{n} tokens, at most {(1 << 32) - 1} can be numbered")
    if n and tokens.min() < TEXT_BREAK:
        raise ValueError(f"a token is {tokens.min()}")
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
