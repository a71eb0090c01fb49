"""The latest tokens of an engine's texts, with a search for earlier occurrences of the end of a text.

The tokens are in a ring buffer. Each position is chained to the previous position at which the same two tokens end. A
search follows that chain from the newest position, and keeps the positions at which the most tokens match. Appending
takes constant time per token, the memory is fixed, and new tokens overwrite the oldest ones. Suffix decoding (arXiv
2411.04975) keeps the same information in suffix trees, which need several times the memory.

Compiled with numba, so import it late (see `_internal.jit`).
"""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from .suffix_array import TEXT_BREAK

Int32, Int64 = NDArray[np.int32], NDArray[np.int64]
MAX_CANDIDATES = 128  # positions of a chain that are compared


@jit
def _slot(before: int, last: int, size: int) -> "int | np.int64":
    """Return the hash slot of the chain of two tokens."""
    x = (np.uint64(before) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(last) * np.uint64(0xC2B2AE3D27D4EB4F))
    x ^= x >> np.uint64(31)
    return np.int64(x & np.uint64(size - 1))


@jit
def _append(ring: Int32, earlier: Int64, heads: Int64, written: int, tokens: Int32) -> int:
    """Append tokens to the ``written`` earlier ones; return the new number of tokens."""
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
    """Find the longest suffix; see `TokenHistory.find_longest_suffix`.

    Returns:
        The number of matching tokens, and the number of rows written to ``out``.
    """
    rows, width = out.shape
    n, mask = tail.shape[0], ring.shape[0] - 1
    if n < 2 or tail[n - 1] < 0 or tail[n - 2] < 0:
        return 0, 0
    oldest = max(0, written - ring.shape[0])
    best, count = 0, 0
    positions = np.empty(rows, np.int64)
    at = heads[_slot(int(tail[n - 2]), int(tail[n - 1]), heads.shape[0])]
    for _ in range(MAX_CANDIDATES):
        if at < oldest:
            break
        length = 0
        while length < longest and length < n and at - length >= oldest:
            token = ring[(at - length) & mask]
            if token != tail[n - 1 - length]:  # a break matches no token
                break
            length += 1
        if length >= shortest and at + 1 < written and ring[(at + 1) & mask] >= 0:
            if length > best:
                best, count = length, 0
            if length == best and count < rows:
                positions[count] = at
                count += 1
        at = earlier[at & mask]
    for r in range(count):
        in_text = True
        for i in range(width):
            follower = positions[r] + 1 + i
            in_text = in_text and follower < written and ring[follower & mask] >= 0
            out[r, i] = ring[follower & mask] if in_text else TEXT_BREAK
    return best, count


class TokenHistory:
    """A ring buffer of the latest tokens of one or more texts."""

    def __init__(self, capacity: int) -> None:
        """Allocate memory for ``capacity`` tokens, rounded up to a power of two; each token takes 16 bytes."""
        size = 1 << max(4, (capacity - 1).bit_length())
        self._ring = np.full(size, TEXT_BREAK, np.int32)
        self._earlier, self._heads = np.full(size, -1, np.int64), np.full(max(16, size // 2), -1, np.int64)
        self._written = 0

    def __len__(self) -> int:
        """Return the number of tokens in memory, breaks between texts included."""
        return min(self._written, len(self._ring))

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""
        return self._ring.nbytes + self._earlier.nbytes + self._heads.nbytes

    def with_capacity(self, tokens: int) -> "TokenHistory":
        """Return this history if ``tokens`` more tokens fit without overwriting any, else a larger copy."""
        if self._written + tokens <= len(self._ring):
            return self
        larger = TokenHistory(max(2 * len(self._ring), self._written + tokens))
        held = np.arange(self._written - len(self), self._written) & (len(self._ring) - 1)
        larger.append(self._ring[held])
        return larger

    def append(self, tokens: Int32, ends: bool = False) -> None:
        """Append tokens to the current text.

        Args:
            tokens: [t] token ids.
            ends: Whether the text ends with these tokens, so that later tokens belong to another text.
        """
        pieces = [np.ascontiguousarray(tokens, np.int32)]
        if ends:
            pieces.append(np.array([TEXT_BREAK], np.int32))
        for piece in pieces:
            self._written = _append(self._ring, self._earlier, self._heads, self._written, piece)

    def find_longest_suffix(
        self, tail: Int32, width: int, most: int, longest: int, shortest: int = 2
    ) -> tuple[int, Int32]:
        """Find the longest suffix of a text that occurred before, and the tokens that followed it.

        Args:
            tail: [t] latest tokens of the text.
            width: Number of following tokens to return.
            most: Largest number of occurrences to return, the newest first.
            longest: Largest number of tokens to match.
            shortest: Smallest number of tokens that must match, at least 2.

        Returns:
            The number of matching tokens (0 if fewer than ``shortest`` match), and the tokens after each occurrence,
            [occurrences, width]; `TEXT_BREAK` after the end of a text.
        """
        out = np.empty((most, width), np.int32)
        tail = np.ascontiguousarray(tail[-longest:], np.int32)
        state = (self._ring, self._earlier, self._heads, self._written)
        length, count = _find(*state, tail, longest, shortest, out)
        return length, out[:count]
