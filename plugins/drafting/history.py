"""Texts of an engine, as they come: where the end of a text was seen before, and what followed there.

A ring of the latest tokens. Every position is chained to the one before it at which the same two tokens end; a look-up
goes down that chain from the newest, and keeps where the most tokens agree. Appending takes constant time for each
token, memory is fixed, and the oldest tokens make room. What suffix decoding (arXiv 2411.04975) keeps in trees, at a
fraction of the memory.

Compiled, so import it late (see `compiled`).
"""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from .suffix_array import TEXT_BREAK

Int32, Int64 = NDArray[np.int32], NDArray[np.int64]
MAX_CANDIDATES = 128  # positions of a chain that are looked at


@jit
def _slot(before: int, last: int, size: int) -> "int | np.int64":
    """Where the chain of two tokens begins."""
    x = (np.uint64(before) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(last) * np.uint64(0xC2B2AE3D27D4EB4F))
    x ^= x >> np.uint64(31)
    return np.int64(x & np.uint64(size - 1))


@jit
def _append(ring: Int32, earlier: Int64, heads: Int64, written: int, tokens: Int32) -> int:
    """Write tokens behind the first ``written``; returns how many there have been then."""
    mask = ring.shape[0] - 1
    for token in tokens:
        at = written & mask
        ring[at], earlier[at] = token, -1
        before = ring[(written - 1) & mask] if written else TEXT_BREAK
        if token >= 0 and before >= 0:
            slot = _slot(int(before), int(token), heads.shape[0])
            earlier[at], heads[slot] = heads[slot], written
        written += 1
    return written


@jit
def _find(
    ring: Int32, earlier: Int64, heads: Int64, written: int, tail: Int32, longest: int, shortest: int, out: Int32
) -> "tuple[int, int]":
    """See `History.find`; returns how many tokens agree, and how many rows of ``out`` are filled."""
    rows, width = out.shape
    n, mask = tail.shape[0], ring.shape[0] - 1
    if n < 2 or tail[n - 1] < 0 or tail[n - 2] < 0:
        return 0, 0
    oldest = max(0, written - ring.shape[0])
    best, found = 0, 0
    places = np.empty(rows, np.int64)
    at = heads[_slot(int(tail[n - 2]), int(tail[n - 1]), heads.shape[0])]
    for _ in range(MAX_CANDIDATES):
        if at < oldest:
            break
        length = 0
        while length < longest and length < n and at - length >= oldest:
            token = ring[(at - length) & mask]
            if token != tail[n - 1 - length]:  # a break agrees with nothing
                break
            length += 1
        if length >= shortest and at + 1 < written and ring[(at + 1) & mask] >= 0:
            if length > best:
                best, found = length, 0
            if length == best and found < rows:
                places[found] = at
                found += 1
        at = earlier[at & mask]
    for r in range(found):
        going = True
        for i in range(width):
            follower = places[r] + 1 + i
            going = going and follower < written and ring[follower & mask] >= 0
            out[r, i] = ring[follower & mask] if going else TEXT_BREAK
    return best, found


class TokenHistory:
    """The latest tokens of one text, or of many."""

    def __init__(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens, rounded up to a power of two; it takes 16 bytes for each."""
        size = 1 << max(4, (capacity - 1).bit_length())
        self._ring = np.full(size, TEXT_BREAK, np.int32)
        self._earlier, self._heads = np.full(size, -1, np.int64), np.full(max(16, size // 2), -1, np.int64)
        self._written = 0

    def __len__(self) -> int:
        """Tokens held, breaks between texts included."""
        return min(self._written, len(self._ring))

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self._ring.nbytes + self._earlier.nbytes + self._heads.nbytes

    def with_capacity(self, tokens: int) -> "TokenHistory":
        """Itself if so many more tokens fit without dropping any, else a larger history of the same text."""
        if self._written + tokens <= len(self._ring):
            return self
        larger = TokenHistory(max(2 * len(self._ring), self._written + tokens))
        held = np.arange(self._written - len(self), self._written) & (len(self._ring) - 1)
        larger.append(self._ring[held])
        return larger

    def append(self, tokens: Int32, ends: bool = False) -> None:
        """Add tokens [t] to the text that is being written; ``ends``: the next ones belong to another."""
        pieces = [np.ascontiguousarray(tokens, np.int32)]
        if ends:
            pieces.append(np.array([TEXT_BREAK], np.int32))
        for piece in pieces:
            self._written = _append(self._ring, self._earlier, self._heads, self._written, piece)

    def find_longest_suffix(
        self, tail: Int32, width: int, most: int, longest: int, shortest: int = 2
    ) -> tuple[int, Int32]:
        """Where the longest possible end of a text was seen, and what followed.

        Args:
            tail: [t] the text's latest tokens.
            width: Tokens of what followed.
            most: Occurrences at most, the newest first.
            longest: Tokens that are compared.
            shortest: Tokens that have to agree, at least 2.

        Returns:
            How many tokens agree (0: too few anywhere), and what followed, [occurrences, width]; `BREAK` behind an end.
        """
        out = np.empty((most, width), np.int32)
        tail = np.ascontiguousarray(tail[-longest:], np.int32)
        state = (self._ring, self._earlier, self._heads, self._written)
        length, found = _find(*state, tail, longest, shortest, out)
        return length, out[:found]
