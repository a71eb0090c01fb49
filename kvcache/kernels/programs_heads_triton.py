"""Triton kernels of `head_cache_triton`: every KV head has its own blocks, which are found by address.

``where`` [num_kv_heads, 5] int64 holds for each KV head of a layer the addresses of its cache, block table and slots,
the length of a row of the block table, and whether it is a non-retrieval head.
"""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_triton import merge_splits, online_softmax_step

jit = cast(Any, triton.jit)


@jit
def load_head(where, kv_head, like):
    """Return cache, block table, row length and the windowed flag of a KV head; the cache has the dtype of ``like``."""
    at = where + kv_head * 5
    # The compiler cannot know the alignment of an address that is read from memory, and would load single elements.
    cache = tl.multiple_of(tl.load(at).to(tl.pointer_type(like.dtype.element_ty)), 16)
    table = tl.load(at + 1).to(tl.pointer_type(tl.int32))
    return cache, table, tl.load(at + 3), tl.load(at + 4) != 0


@jit
def store_kv_kernel(
    key,
    value,
    where,
    key_stride,
    value_stride,
    block_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the key and value of one token to the cache of one head."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cache, _, _, _ = load_head(where, kv_head, key)
    slot = tl.load(tl.load(where + kv_head * 5 + 2).to(tl.pointer_type(tl.int64)) + token)
    if slot >= 0:
        d = tl.arange(0, HEAD_SIZE_PADDED)
        to = cache + slot // BLOCK * block_stride + slot % BLOCK * 2 * HEAD_SIZE + d
        tl.store(
            to, tl.load(key + token * key_stride + kv_head * HEAD_SIZE + d, mask=d < HEAD_SIZE), mask=d < HEAD_SIZE
        )
        v = tl.load(value + token * value_stride + kv_head * HEAD_SIZE + d, mask=d < HEAD_SIZE)
        tl.store(to + HEAD_SIZE, v, mask=d < HEAD_SIZE)


@jit
def update_means_kernel(
    like,
    where,
    starts,
    seq_lens,
    block_stride,
    sinks,  # in blocks
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the means of K (or V) for each block that gets its first token in this step, one after the other."""
    request, kv_head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cache, table, row, windowed = load_head(where, kv_head, like)
    end = tl.load(seq_lens + request)
    begin = end - (tl.load(starts + request + 1) - tl.load(starts + request))
    if windowed & (begin < end):
        d, t = tl.arange(0, HEAD_SIZE_PADDED), tl.arange(0, BLOCK)
        d_mask = d < HEAD_SIZE
        for j in range(tl.maximum((begin + BLOCK - 1) // BLOCK, sinks), (end + BLOCK - 1) // BLOCK):
            mean = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
            if j > sinks:
                before = cache + tl.load(table + request * row + j - 1).to(tl.int64) * block_stride
                at = before + t[:, None] * 2 * HEAD_SIZE + which * HEAD_SIZE + d[None, :]
                added = tl.sum(tl.load(at, mask=d_mask[None, :], other=0.0).to(tl.float32), 0) / BLOCK
                means = (before + BLOCK * 2 * HEAD_SIZE).to(tl.pointer_type(tl.float32)) + which * HEAD_SIZE
                old = tl.load(means + d, mask=d_mask, other=0.0)
                mean = old + (added - old) / (j - sinks)
            to = cache + tl.load(table + request * row + j).to(tl.int64) * block_stride + BLOCK * 2 * HEAD_SIZE
            tl.store(to.to(tl.pointer_type(tl.float32)) + which * HEAD_SIZE + d, mean, mask=d_mask)


@jit
def num_evicted(before, windowed, sinks, window, ratio, BLOCK: tl.constexpr):
    """Return how many tokens, in whole blocks, are evicted for query tokens with ``before`` tokens before them."""
    max_split_query_len = window + before * 0
    if ratio > 0:
        max_split_query_len = tl.maximum(before // ratio, window)
    return tl.where(windowed, tl.maximum((before - max_split_query_len) // BLOCK - sinks, 0) * BLOCK, 0)


@jit
def compensation(q, cache, table, gap, sinks, scale, block_stride, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, d):
    """Compute the compensation token of the evicted tokens, as the first step of an online softmax.

    Returns:
        The logits, with the weight of the evicted tokens (-inf if no token is evicted), the softmax sums, and the
        values.
    """
    some = gap > 0
    means_mask = some[:, None] & (d < HEAD_SIZE)[None, :]
    block = tl.load(table + sinks + gap // BLOCK, mask=some, other=0).to(tl.int64)
    means = (cache + block * block_stride + BLOCK * 2 * HEAD_SIZE).to(tl.pointer_type(tl.float32))[:, None] + d[None, :]
    product = tl.sum(q.to(tl.float32) * tl.load(means, mask=means_mask, other=0.0), 1)
    logit = product * scale + tl.log(tl.maximum(gap, 1).to(tl.float32))
    return (
        tl.where(some, logit, -float("inf")),
        tl.where(some, 1.0, 0.0),
        tl.load(means + HEAD_SIZE, mask=means_mask, other=0.0),
    )


@jit
def windowed_attention_kernel(
    query,
    where,
    starts,
    seq_lens,
    prompt_lens,
    output,
    parts,
    tops,
    totals,
    scale,
    query_stride,
    output_stride,
    block_stride,
    tiles,
    max_split_query_len,  # the KV of requests with up to this many query tokens is split
    sinks,  # in blocks
    window,
    ratio,
    HEADS: tl.constexpr,  # number of query heads
    NUM_QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # query tokens in a tile; TOKENS * NUM_QUERIES_PER_KV of ROWS rows are used
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,  # full attention during prefill
    COMPENSATION: tl.constexpr,
    SPLIT_KV: tl.constexpr,  # whether to process the requests whose KV is split, or all others
):
    """Compute the attention of a tile of query tokens over the tokens that their heads keep.

    With ``SPLIT_KV`` a program reads one split of a request's retained tokens and writes unnormalized partial results,
    which `merge_splits_kernel` merges. Otherwise it reads all of them and writes the output.
    """
    request, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, part = tl.program_id(1), tl.program_id(2)
    start, context = tl.load(starts + request), tl.load(seq_lens + request)
    length = tl.load(starts + request + 1) - start
    first = tile * TOKENS
    if (first < length) & ((length <= max_split_query_len) == SPLIT_KV):
        cache, table, row, windowed = load_head(where, kv_head, query)
        table += request * row
        i, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        # Rows after the last token repeat it, and are not stored.
        token = tl.minimum(first + i // NUM_QUERIES_PER_KV, length - 1)
        row_mask = (i < TOKENS * NUM_QUERIES_PER_KV) & (first + i // NUM_QUERIES_PER_KV < length)
        head = kv_head * NUM_QUERIES_PER_KV + i % NUM_QUERIES_PER_KV
        d_mask = d < HEAD_SIZE
        q = tl.load(
            query + (start + token).to(tl.int64)[:, None] * query_stride + head[:, None] * HEAD_SIZE + d[None, :],
            mask=row_mask[:, None] & d_mask[None, :],
            other=0.0,
        )
        before = context - length + token  # number of tokens before each query token
        gap = num_evicted(before, windowed, sinks, window, ratio, BLOCK)
        if EXACT:
            gap = tl.where(before < tl.load(prompt_lens + request), 0, gap)
        least = tl.min(gap, 0)
        edge = sinks * BLOCK
        last = tl.max(before, 0) + 1
        count = last - least  # positions to read

        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, HEAD_SIZE_PADDED], tl.float32)
        if COMPENSATION:
            gap_of_part = tl.where(part == 0, gap, 0)
            top, total, mixed = compensation(
                q, cache, table, gap_of_part, sinks, scale, block_stride, HEAD_SIZE, BLOCK, d
            )

        # Splits have the same number of positions in all heads, so that programs take equally long; a windowed head
        # leaves the last splits empty.
        each = tl.cdiv(tl.cdiv(last, tl.num_programs(2)), TILE) * TILE
        for begin in range(part * each, tl.minimum(part * each + each, count), TILE):
            index = begin + tl.arange(0, TILE)
            position = tl.where(index < edge, index, index + least)
            inside = index < count
            block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
            at = cache + block * block_stride + (position % BLOCK) * 2 * HEAD_SIZE
            k = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            dropped = (position[None, :] >= edge) & (position[None, :] < edge + gap[:, None])
            x = tl.where((position[None, :] <= before[:, None]) & inside[None, :] & ~dropped, x, -float("inf"))
            v = tl.load(at[:, None] + HEAD_SIZE + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            top, total, mixed = online_softmax_step(x, v, top, total, mixed)

        if SPLIT_KV:
            to = ((request * max_split_query_len + token).to(tl.int64) * HEADS + head) * tl.num_programs(2) + part
            used = row_mask & (part * each + 0 * i < count)  # by row, since Triton's interpreter has no scalar masks
            tl.store(parts + to[:, None] * HEAD_SIZE + d[None, :], mixed, mask=used[:, None] & d_mask[None, :])
            tl.store(tops + to, top, mask=row_mask)
            tl.store(totals + to, total, mask=used)
        else:
            to = output + (start + token).to(tl.int64) * output_stride + head * HEAD_SIZE
            tl.store(
                to[:, None] + d[None, :],
                (mixed / total[:, None]).to(output.dtype.element_ty),
                mask=row_mask[:, None] & d_mask[None, :],
            )


@jit
def merge_splits_kernel(
    parts,
    tops,
    totals,
    starts,
    output,
    count,
    max_split_query_len,
    output_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Merge the splits of one query token and head, by log-sum-exp."""
    request, token = tl.program_id(0) // max_split_query_len, tl.program_id(0) % max_split_query_len
    head = tl.program_id(1)
    start = tl.load(starts + request)
    length = tl.load(starts + request + 1) - start
    if (token < length) & (length <= max_split_query_len):
        d = tl.arange(0, HEAD_SIZE_PADDED)
        base = (tl.program_id(0).to(tl.int64) * HEADS + head) * count
        merged = merge_splits(parts, tops, totals, base, count, d, HEAD_SIZE, HEAD_SIZE_PADDED, SPLITS_AT_ONCE)
        to = output + (start + token).to(tl.int64) * output_stride + head * HEAD_SIZE + d
        tl.store(to, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)
