"""Search for the end of a text in a suffix array. Compiled with numba, so import it late (see `_internal.jit`)."""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from .suffix_array import SUFFIX_DEPTH, SuffixMatch

Int32, UInt32 = NDArray[np.int32], NDArray[np.uint32]


@jit
def _compare(tokens: Int32, at: "int | np.int64", pattern: Int32) -> int:
    """Return 0 if the suffix at a position begins with ``pattern``, -1 if it comes before those that do, else 1."""
    for i in range(pattern.shape[0]):
        if at + i >= tokens.shape[0] or tokens[at + i] < pattern[i]:
            return -1
        if tokens[at + i] > pattern[i]:
            return 1
    return 0


@jit
def _first(tokens: Int32, order: UInt32, pattern: Int32, begin: int, end: int, upper: bool) -> int:
    """Return the first suffix in ``order`` that begins with a pattern, or with ``upper`` the first after those."""
    while begin < end:
        middle = (begin + end) // 2
        order_to_pattern = _compare(tokens, np.int64(order[middle]), pattern)
        if order_to_pattern < 0 or (upper and order_to_pattern == 0):
            begin = middle + 1
        else:
            end = middle
    return begin


@jit
def _find(tokens: Int32, order: UInt32, tail: Int32, longest: int, shortest: int) -> "tuple[int, int, int]":
    """Find the longest suffix of ``tail``; see `find_longest_suffix`.

    If the last n tokens occur, the last n - 1 do too, so the length is found by binary search.
    """
    n = order.shape[0]
    best = (0, 0, 0)
    low, high = shortest, min(longest, tail.shape[0])
    while low <= high:
        length = (low + high + 1) // 2 if best[0] else low  # most searches fail at the shortest length
        pattern = tail[tail.shape[0] - length :]
        begin = _first(tokens, order, pattern, 0, n, False)
        if begin < n and _compare(tokens, np.int64(order[begin]), pattern) == 0:
            best = (length, begin, _first(tokens, order, pattern, begin, n, True))
            low = length + 1
        else:
            high = length - 1
    return best


def find_longest_suffix(
    tokens: Int32, order: UInt32, tail: Int32, longest: int = SUFFIX_DEPTH, shortest: int = 2
) -> SuffixMatch:
    """Find the longest suffix of ``tail`` that occurs in a text.

    Args:
        tokens: [n] token ids of the text.
        order: [n] suffix array of the text, from `suffix_array.build_suffix_array`.
        tail: [t] latest tokens of a request.
        longest: Largest number of tokens to match, at most `SUFFIX_DEPTH`.
        shortest: Smallest number of tokens that must match.
    """
    return SuffixMatch(*_find(tokens, order, tail, min(longest, SUFFIX_DEPTH), max(shortest, 1)))


@jit
def _followers(tokens: Int32, order: UInt32, begin: int, end: int, skip: int, out: Int32) -> int:
    rows, width = out.shape
    count = end - begin
    taken = min(rows, count)
    for r in range(taken):
        at = np.int64(order[begin + r * count // taken]) + skip
        in_text = True
        for i in range(width):
            in_text = in_text and at + i < tokens.shape[0] and tokens[at + i] >= 0
            out[r, i] = tokens[at + i] if in_text else -1
    return taken


def continuations(tokens: Int32, order: UInt32, match: SuffixMatch, width: int, most: int) -> Int32:
    """Return the tokens that follow the occurrences of a match, [at most ``most``, width]; -1 after the end of a text.

    If there are more than ``most`` occurrences, they are sampled at equal distances in the suffix array, so that
    frequent continuations stay frequent.
    """
    out = np.empty((min(most, match.occurrences), width), np.int32)
    _followers(tokens, order, match.begin, match.end, match.length, out)
    return out
