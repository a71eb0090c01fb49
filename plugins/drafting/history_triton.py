"""Searches on a device for earlier occurrences of the end of a text; the counterpart of `history`.

A search reads the whole history and needs no index: 4 bytes per token, where the key-value cache of the same text has
some 100,000. vLLM's ``ngram_gpu`` reads it too. TensorRT-LLM builds a suffix automaton for each request, which reads
less and takes more memory.

Positions are counted from the newest token, so that a ring buffer is read like a text. Occurrences are listed with the
newest first, as on the host, and no atomic operation decides anything: all ranks find the same.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

from ..contracts import DeviceBatch
from .suffix_array import TEXT_BREAK

if TYPE_CHECKING:
    from torch import Tensor

jit = cast(Any, triton.jit)
BLOCK = 1024  # tokens of a program
REQUESTS = 8  # requests for which a program reads a block of the history of all requests
NO_TOKEN: tl.constexpr = tl.constexpr(-2)  # where there is no token; equal to none, and to no break
BREAK: tl.constexpr = tl.constexpr(TEXT_BREAK)


@jit
def occurrences(tokens, mask, written, oldest, offset, wanted, present, total, LONGEST: tl.constexpr):
    """Return how many tokens up to each position equal the ends of texts, [requests, positions].

    It is 0 where no token follows in the same text.

    Args:
        tokens: A text, or a ring buffer of texts.
        mask: Size of the ring buffer less one; -1 for a text.
        written: Number of tokens that were ever written.
        oldest: First of them that is still there.
        offset: [positions] distance of each position from the newest token.
        wanted: [requests] pointers to the last tokens of the texts.
        present: [requests] whether there is such a request.
        total: [requests] lengths of the texts.
        LONGEST: Largest number of tokens to compare.
    """
    at = written - 1 - offset
    equal = present[:, None] & (at >= oldest)[None, :]
    length = tl.zeros([wanted.shape[0], offset.shape[0]], tl.int32)
    d = 0
    while (d < LONGEST) & (tl.max(tl.max(equal.to(tl.int32), axis=1), axis=0) > 0):
        token = tl.load(tokens + ((at - d) & mask), mask=at - d >= oldest, other=NO_TOKEN)
        own = tl.load(wanted - d, mask=present & (d < total), other=NO_TOKEN - 1)
        equal = equal & (token[None, :] == own[:, None])
        length += equal.to(tl.int32)
        d += 1
    follower = tl.load(tokens + ((at + 1) & mask), mask=(offset > 0) & (at >= oldest), other=BREAK)
    return tl.where((follower >= 0)[None, :], length, 0)


@jit
def longest_in_block(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    ring,
    ring_written,
    ring_size,
    block_matches,
    num_requests,
    num_blocks,
    group,
    block,
    SHARED: tl.constexpr,
    REQUESTS: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the length of the longest match in one block of positions, for one group of requests.

    With ``SHARED`` they search the ring buffer, otherwise one request searches its own text.
    """
    request = group * REQUESTS + tl.arange(0, REQUESTS)
    present = request < num_requests
    req_idx = tl.load(idx_mapping + request, mask=present, other=0).to(tl.int64)
    total = tl.load(total_len + req_idx, mask=present, other=0).to(tl.int64)
    wanted = all_token_ids + req_idx * token_ids_stride + total - 1
    offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if SHARED:
        written = tl.load(ring_written)
        oldest = tl.maximum(written - ring_size, 0)
        length = occurrences(ring, ring_size - 1, written, oldest, offset, wanted, present, total, LONGEST)
    else:
        text, written = all_token_ids + tl.sum(req_idx, axis=0) * token_ids_stride, tl.sum(total, axis=0)
        length = occurrences(text, -1, written, 0, offset, wanted, present, total, LONGEST)
    tl.store(block_matches + request * num_blocks + block, tl.max(length, axis=1), mask=present)


@jit
def longest_matches_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    ring,
    ring_written,
    ring_size,
    own_matches,  # [requests, own_blocks] of the own text; output
    shared_matches,  # [requests, shared_blocks] of the ring buffer; output
    num_requests,
    own_blocks,
    shared_blocks,
    OWN: tl.constexpr,
    REQUESTS: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the length of the longest match in one block: of a request's own text with ``OWN``, then of the ring."""
    program = tl.program_id(0)
    own_programs = num_requests * own_blocks * OWN
    batch = all_token_ids, token_ids_stride, idx_mapping, total_len
    search = ring, ring_written, ring_size
    if program < own_programs:
        group, block = program // own_blocks, program % own_blocks
        found = own_matches, num_requests, own_blocks
        longest_in_block(*batch, *search, *found, group, block, False, 1, LONGEST, BLOCK)
    else:
        group, block = (program - own_programs) // shared_blocks, (program - own_programs) % shared_blocks
        found = shared_matches, num_requests, shared_blocks
        longest_in_block(*batch, *search, *found, group, block, True, REQUESTS, LONGEST, BLOCK)


@jit
def write_followers(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    ring,
    ring_written,
    ring_size,
    block_matches,
    followers,
    lengths,
    num_blocks,
    SHARED: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
    MOST_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_BLOCKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tokens that follow the newest occurrences of one request's longest match, and the match's length.

    Only blocks with such a match are read again.
    """
    request = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    total = tl.load(total_len + req_idx).to(tl.int64)
    wanted = all_token_ids + req_idx * token_ids_stride + total - 1 + one
    if SHARED:
        tokens, mask, written = ring, ring_size - 1, tl.load(ring_written)
        oldest = tl.maximum(written - ring_size, 0)
    else:
        tokens, mask, written = all_token_ids + req_idx * token_ids_stride, ring_size * 0 - 1, total
        oldest = written * 0
    blocks = tl.arange(0, NUM_BLOCKS_PADDED)
    longest_of = tl.load(block_matches + request * num_blocks + blocks, mask=blocks < num_blocks, other=0)
    best = tl.max(longest_of, axis=0)
    best = tl.where(best >= SHORTEST, best, 0)
    tl.store(lengths + request, best)
    left = (longest_of == best) & (best > 0)
    count = 0
    while (count < MOST) & (tl.max(left.to(tl.int32), axis=0) > 0):
        block = tl.min(tl.where(left, blocks, NUM_BLOCKS_PADDED), axis=0)
        left = left & (blocks != block)
        offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        length = occurrences(tokens, mask, written, oldest, offset, wanted, one == 0, total + one, LONGEST)
        found = tl.max((length == best).to(tl.int32), axis=0)  # of the only request
        rank = count + tl.cumsum(found, axis=0) - 1
        kept = (found > 0) & (rank < MOST)
        at, in_text = written - 1 - offset, kept
        for i in range(WIDTH):
            follower = at + 1 + i
            token = tl.load(tokens + (follower & mask), mask=kept & (follower < written), other=BREAK)
            in_text = in_text & (token >= 0)
            tl.store(followers + (request * MOST + rank) * WIDTH + i, tl.where(in_text, token, BREAK), mask=kept)
        count += tl.sum(found, axis=0)
    row = tl.arange(0, MOST_PADDED)
    for i in range(WIDTH):
        empty = (row >= count) & (row < MOST)
        tl.store(followers + (request * MOST + row) * WIDTH + i, tl.zeros_like(row) + BREAK, mask=empty)


@jit
def followers_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    ring,
    ring_written,
    ring_size,
    own_matches,
    shared_matches,
    followers,
    lengths,
    own_blocks,
    shared_blocks,
    max_num_reqs,
    OWN: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
    MOST_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN_BLOCKS_PADDED: tl.constexpr,
    SHARED_BLOCKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what follows the longest match of one request in one source; see `write_followers`."""
    source = tl.program_id(1)
    batch = all_token_ids, token_ids_stride, idx_mapping, total_len
    to = followers + source.to(tl.int64) * max_num_reqs * MOST * WIDTH, lengths + source * max_num_reqs
    search = ring, ring_written, ring_size
    if source < OWN:
        write_followers(
            *batch,
            *search,
            own_matches,
            *to,
            own_blocks,
            False,
            SHORTEST,
            LONGEST,
            MOST,
            MOST_PADDED,
            WIDTH,
            OWN_BLOCKS_PADDED,
            BLOCK,
        )
    else:
        write_followers(
            *batch,
            *search,
            shared_matches,
            *to,
            shared_blocks,
            True,
            SHORTEST,
            LONGEST,
            MOST,
            MOST_PADDED,
            WIDTH,
            SHARED_BLOCKS_PADDED,
            BLOCK,
        )


@jit
def append_kernel(text, begin, length, ring, ring_written, ring_size, BLOCK: tl.constexpr):
    """Append the tokens of a text from ``begin`` on to the ring buffer, and a break."""
    end, written = tl.load(length).to(tl.int64), tl.load(ring_written)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = end - begin
    token = tl.load(text + begin + i, mask=i < count, other=BREAK)
    # Of a text that is longer than the ring, the end remains.
    tl.store(ring + ((written + i) & (ring_size - 1)), token, mask=(i <= count) & (i > count - ring_size))


class DeviceHistory:
    """A ring buffer of the latest tokens of texts, on a device.

    Args:
        capacity: Number of tokens, rounded up to a power of two; each takes 4 bytes.
        device: The device.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.size = 1 << max(4, (capacity - 1).bit_length())
        self.ring = torch.full((self.size,), TEXT_BREAK, dtype=torch.int32, device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)

    def append(self, text: "Tensor", begin: int, length: "Tensor") -> None:
        """Append the end of a text.

        Args:
            text: [t] int32 token ids, and anything after them.
            begin: First token that is appended.
            length: [1] int32 number of tokens of the text, on the device.
        """
        most = len(text) - begin + 1  # with the break
        append_kernel[(triton.cdiv(most, BLOCK),)](text, begin, length, self.ring, self.written, self.size, BLOCK=BLOCK)
        self.written += length - begin + 1


class SuffixSearch:
    """A search for the longest suffixes of the texts of a batch, with memory for the largest batch.

    Args:
        own: Whether each request's own text is searched; it is the first source then.
        history: The history of all requests, the next source; None for none.
        max_num_reqs: Largest number of requests of a batch.
        max_model_len: Largest number of tokens of a text.
        longest: Largest number of tokens to match.
        shortest: Smallest number of tokens that have to match.
        device: The device.

    Attributes:
        sources: Number of sources.
    """

    def __init__(
        self,
        own: bool,
        history: DeviceHistory | None,
        max_num_reqs: int,
        max_model_len: int,
        longest: int,
        shortest: int,
        device: torch.device,
    ) -> None:
        self._own, self._history, self._longest, self._shortest = own, history, longest, shortest
        self.sources = int(own) + (history is not None)
        self._own_blocks = triton.cdiv(max_model_len, BLOCK) if own else 1
        self._shared_blocks = 1 if history is None else triton.cdiv(history.size, BLOCK)
        self._own_matches, self._shared_matches = (
            torch.zeros(max_num_reqs * blocks, dtype=torch.int32, device=device)
            for blocks in (self._own_blocks, self._shared_blocks)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, without the history."""
        return self._own_matches.nbytes + self._shared_matches.nbytes

    def find(self, batch: DeviceBatch, followers: "Tensor", lengths: "Tensor") -> None:
        """Find the longest suffix of each text that occurred before, and the tokens that followed it.

        Args:
            batch: The step.
            followers: [sources, max_num_reqs, occurrences, width] int32, contiguous: the tokens after each occurrence,
                the newest first; `TEXT_BREAK` after the end of a text, and where there are fewer occurrences; output.
            lengths: [sources, max_num_reqs] int32, contiguous: number of matching tokens; 0 if fewer than ``shortest``
                match; output.
        """
        history = self._history
        ring, written, size = (
            (batch.all_token_ids, batch.total_len, 1)
            if history is None
            else (history.ring, history.written, history.size)
        )
        groups = 0 if history is None else triton.cdiv(batch.num_requests, REQUESTS)
        programs = batch.num_requests * self._own_blocks * self._own + groups * self._shared_blocks
        longest_matches_kernel[(programs,)](
            *batch.texts,
            ring,
            written,
            size,
            self._own_matches,
            self._shared_matches,
            batch.num_requests,
            self._own_blocks,
            self._shared_blocks,
            OWN=int(self._own),
            REQUESTS=REQUESTS,
            LONGEST=self._longest,
            BLOCK=BLOCK,
        )
        _, max_num_reqs, most, width = followers.shape
        followers_kernel[(batch.num_requests, self.sources)](
            *batch.texts,
            ring,
            written,
            size,
            self._own_matches,
            self._shared_matches,
            followers,
            lengths,
            self._own_blocks,
            self._shared_blocks,
            max_num_reqs,
            OWN=int(self._own),
            SHORTEST=self._shortest,
            LONGEST=self._longest,
            MOST=most,
            MOST_PADDED=triton.next_power_of_2(most),
            WIDTH=width,
            OWN_BLOCKS_PADDED=triton.next_power_of_2(self._own_blocks),
            SHARED_BLOCKS_PADDED=triton.next_power_of_2(self._shared_blocks),
            BLOCK=BLOCK,
        )
