"""Looking up the end of a text in a suffix array; compiled, so import it late (see `compiled`)."""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from .suffix_array import SUFFIX_DEPTH, SuffixMatch

Int32, UInt32 = NDArray[np.int32], NDArray[np.uint32]


@jit
def _compare(tokens: Int32, at: "int | np.int64", pattern: Int32) -> int:
    """Whether the suffix at a position comes before (-1) or behind (1) all that begin with ``pattern``; 0: is one."""
    for i in range(pattern.shape[0]):
        if at + i >= tokens.shape[0] or tokens[at + i] < pattern[i]:
            return -1
        if tokens[at + i] > pattern[i]:
            return 1
    return 0


@jit
def _first(tokens: Int32, order: UInt32, pattern: Int32, begin: int, end: int, behind: bool) -> int:
    """The first suffix of ``order[begin:end]`` that begins with the pattern, or (``behind``) comes behind those."""
    while begin < end:
        middle = (begin + end) // 2
        found = _compare(tokens, np.int64(order[middle]), pattern)
        if found < 0 or (behind and found == 0):
            begin = middle + 1
        else:
            end = middle
    return begin


@jit
def _find(tokens: Int32, order: UInt32, tail: Int32, longest: int, shortest: int) -> "tuple[int, int, int]":
    """See `find`. Where the last n tokens occur, so do the last n - 1: the length is searched for by halving, too."""
    n = order.shape[0]
    best = (0, 0, 0)
    low, high = shortest, min(longest, tail.shape[0])
    while low <= high:
        length = (low + high + 1) // 2 if best[0] else low  # most look-ups fail at the shortest length
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
    """Where the longest possible end of ``tail`` occurs.

    Args:
        tokens: [n] the text.
        order: [n] its suffixes, of `suffixes.sort`.
        tail: [t] latest tokens of a request.
        longest: Tokens that may match, at most `DEPTH`.
        shortest: Tokens that have to.
    """
    return SuffixMatch(*_find(tokens, order, tail, min(longest, SUFFIX_DEPTH), max(shortest, 1)))


@jit
def _followers(tokens: Int32, order: UInt32, begin: int, end: int, skip: int, out: Int32) -> int:
    rows, width = out.shape
    count = end - begin
    taken = min(rows, count)
    for r in range(taken):
        at = np.int64(order[begin + r * count // taken]) + skip
        going = True
        for i in range(width):
            going = going and at + i < tokens.shape[0] and tokens[at + i] >= 0
            out[r, i] = tokens[at + i] if going else -1
    return taken


def continuations(tokens: Int32, order: UInt32, match: SuffixMatch, width: int, most: int) -> Int32:
    """What followed the occurrences of a match, [at most ``most``, width]; -1 behind the end of a text.

    Of more occurrences some are taken at even distances of the order, so that frequent continuations stay frequent.
    """
    out = np.empty((min(most, match.occurrences), width), np.int32)
    _followers(tokens, order, match.begin, match.end, match.length, out)
    return out
