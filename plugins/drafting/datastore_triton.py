"""Searches in a datastore on a device, in its suffix array; the counterpart of `suffix_search`.

A program searches for one request. In each round it compares the pattern with many suffixes at once, because every
round waits for two reads: of 2**32 suffixes, seven rounds remain.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import triton
import triton.language as tl

from ..contracts import DeviceBatch
from .suffix_array import SUFFIX_DEPTH, TEXT_BREAK

if TYPE_CHECKING:
    from torch import Tensor

    from .datastore import Datastore

jit = cast(Any, triton.jit)
WAYS = 16  # suffixes that are compared at once, of each length
DEPTH: tl.constexpr = tl.constexpr(SUFFIX_DEPTH)
BREAK: tl.constexpr = tl.constexpr(TEXT_BREAK)
NO_TOKEN: tl.constexpr = tl.constexpr(TEXT_BREAK - 1)  # after the last token; below all tokens


@jit
def compare_suffixes(tokens, size, order, index, inside, pattern, length):
    """Return for suffixes [lengths, n] whether they come before (-1) or after (1) their pattern [lengths, DEPTH].

    Those that begin with the first ``length`` [lengths] tokens of the pattern are equal to it (0).
    """
    i = tl.arange(0, DEPTH)[None, None, :]
    at = tl.load(order + index, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    position = at[:, :, None] + i
    used = inside[:, :, None] & (i < length[:, None, None])
    token = tl.load(tokens + position, mask=used & (position < size), other=NO_TOKEN)
    differs = used & (token != pattern[:, None, :])
    first = tl.min(tl.where(differs, i, DEPTH), axis=2)
    here = differs & (i == first[:, :, None])
    return tl.sum(tl.where(here, tl.where(token < pattern[:, None, :], -1, 1), 0), axis=2)


@jit
def narrow(tokens, size, order, begin, end, pattern, length, upper: tl.constexpr, WAYS: tl.constexpr):
    """Return smaller ranges that have the first suffix of each pattern, or with ``upper`` the first after them."""
    j = tl.arange(0, WAYS)[None, :]
    begins, ends = begin[:, None], end[:, None]
    pivot = begins + (ends - begins) * (j + 1) // (WAYS + 1)
    inside = pivot < ends
    order_to_pattern = compare_suffixes(tokens, size, order, pivot, inside, pattern, length)
    before = inside & ((order_to_pattern < 0) | ((order_to_pattern == 0) & upper))
    after = inside & ~before
    return tl.max(tl.where(before, pivot + 1, begins), axis=1), tl.min(tl.where(after, pivot, ends), axis=1)


@jit
def search_datastore_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    tokens,
    order,
    size,
    followers,
    lengths,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    LENGTHS_PADDED: tl.constexpr,
    MOST: tl.constexpr,
    MOST_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    WAYS: tl.constexpr,
):
    """Write the tokens that follow the occurrences of one request's longest match, and the match's length.

    Patterns of all lengths are searched for at once: one after the other would multiply the reads that wait for others.
    """
    request = tl.program_id(0).to(tl.int64)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    total = tl.load(total_len + req_idx)
    text = all_token_ids + req_idx * token_ids_stride + total
    size = tl.load(size)
    i, length = tl.arange(0, DEPTH), SHORTEST + tl.arange(0, LENGTHS_PADDED)
    usable = length <= tl.minimum(total, LONGEST)
    pattern = tl.load(
        text - length[:, None] + i[None, :], mask=usable[:, None] & (i[None, :] < length[:, None]), other=0
    )
    low, high = tl.zeros_like(length).to(tl.int64), tl.zeros_like(length).to(tl.int64)
    low_end, high_end = tl.where(usable, size, 0), tl.where(usable, size, 0)
    while tl.max(tl.maximum(low_end - low, high_end - high), axis=0) > 0:
        low, low_end = narrow(tokens, size, order, low, low_end, pattern, length, False, WAYS)
        high, high_end = narrow(tokens, size, order, high, high_end, pattern, length, True, WAYS)
    best = tl.max(tl.where(low < high, length, 0), axis=0)
    begin = tl.sum(tl.where(length == best, low, 0), axis=0)
    count = tl.sum(tl.where(length == best, high, 0), axis=0) - begin
    tl.store(lengths + request, best)
    row = tl.arange(0, MOST_PADDED)
    taken = tl.minimum(count, MOST)
    in_text = row < taken
    index = begin + row * count // tl.maximum(taken, 1)
    at = tl.load(order + index, mask=in_text, other=0).to(tl.uint32, bitcast=True).to(tl.int64) + best
    for step in range(WIDTH):
        token = tl.load(tokens + at + step, mask=in_text & (at + step < size), other=BREAK)
        in_text = in_text & (token >= 0)
        to = followers + (request * MOST + row) * WIDTH + step
        tl.store(to, tl.where(in_text, token, BREAK), mask=row < MOST)


class DatastoreSearch:
    """A search in a datastore whose tokens and suffix array are on a device: 8 bytes a token.

    Args:
        datastore: The datastore.
        longest: Largest number of tokens to match, at most `SUFFIX_DEPTH`.
        shortest: Smallest number of tokens that have to match.
        device: The device.
    """

    def __init__(self, datastore: "Datastore", longest: int, shortest: int, device: torch.device) -> None:
        self._longest, self._shortest = min(longest, SUFFIX_DEPTH), max(shortest, 1)
        self._tokens = torch.from_numpy(np.array(datastore.tokens)).to(device)
        self._order = torch.from_numpy(np.array(datastore.order).view(np.int32)).to(device)  # the bits of uint32
        self._size = torch.tensor([len(datastore.tokens)], dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._tokens.nbytes + self._order.nbytes

    def find(self, batch: DeviceBatch, followers: "Tensor", lengths: "Tensor") -> None:
        """Find the longest suffix of each text that occurs, and the tokens that follow it.

        If there are more occurrences than ``followers`` has room for, they are sampled at equal distances.

        Args:
            batch: The step.
            followers: [requests, occurrences, width] int32, contiguous: the tokens after each occurrence; `TEXT_BREAK`
                after the end of a text, and where there are fewer occurrences; output.
            lengths: [requests] int32 number of matching tokens; 0 if fewer than ``shortest`` match; output.
        """
        _, most, width = followers.shape
        search_datastore_kernel[(batch.num_requests,)](
            *batch.texts,
            self._tokens,
            self._order,
            self._size,
            followers,
            lengths,
            SHORTEST=self._shortest,
            LONGEST=self._longest,
            LENGTHS_PADDED=triton.next_power_of_2(max(self._longest - self._shortest + 1, 1)),
            MOST=most,
            MOST_PADDED=triton.next_power_of_2(most),
            WIDTH=width,
            WAYS=WAYS,
            num_warps=8,
        )
