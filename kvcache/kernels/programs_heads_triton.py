"""The Triton kernels behind `head_cache_triton`: KV heads with blocks of their own, found by addresses.

``where`` [kv_heads, 5] int64 says for each KV head of a layer where its cache, block table and slots begin, how long a
row of the table is, and whether it is windowed.
"""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_triton import merge_splits, online_softmax_step

jit = cast(Any, triton.jit)


@jit
def load_head(where, kv_head, like):
    """(cache, block table, row length, windowed) of a KV head; the cache's numbers are of ``like``'s type."""
    at = where + kv_head * 5
    cache = tl.load(at).to(tl.pointer_type(like.dtype.element_ty))
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
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one token's key and value to the block of one head."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cache, _, _, _ = load_head(where, kv_head, key)
    slot = tl.load(tl.load(where + kv_head * 5 + 2).to(tl.pointer_type(tl.int64)) + token)
    if slot >= 0:
        d = tl.arange(0, SIZE_PADDED)
        to = cache + slot // BLOCK * block_stride + slot % BLOCK * 2 * SIZE + d
        tl.store(to, tl.load(key + token * key_stride + kv_head * SIZE + d, mask=d < SIZE), mask=d < SIZE)
        v = tl.load(value + token * value_stride + kv_head * SIZE + d, mask=d < SIZE)
        tl.store(to + SIZE, v, mask=d < SIZE)


@jit
def update_means_kernel(
    like,
    where,
    starts,
    seq_lens,
    block_stride,
    sinks,  # blocks
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means of K (or of V) for each block that takes its first token in this step, one after the other."""
    request, kv_head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cache, table, row, windowed = load_head(where, kv_head, like)
    end = tl.load(seq_lens + request)
    begin = end - (tl.load(starts + request + 1) - tl.load(starts + request))
    if windowed & (begin < end):
        d, t = tl.arange(0, SIZE_PADDED), tl.arange(0, BLOCK)
        there = d < SIZE
        for j in range(tl.maximum((begin + BLOCK - 1) // BLOCK, sinks), (end + BLOCK - 1) // BLOCK):
            mean = tl.zeros([SIZE_PADDED], tl.float32)
            if j > sinks:
                before = cache + tl.load(table + request * row + j - 1).to(tl.int64) * block_stride
                at = before + t[:, None] * 2 * SIZE + which * SIZE + d[None, :]
                added = tl.sum(tl.load(at, mask=there[None, :], other=0.0).to(tl.float32), 0) / BLOCK
                behind = (before + BLOCK * 2 * SIZE).to(tl.pointer_type(tl.float32)) + which * SIZE
                old = tl.load(behind + d, mask=there, other=0.0)
                mean = old + (added - old) / (j - sinks)
            to = cache + tl.load(table + request * row + j).to(tl.int64) * block_stride + BLOCK * 2 * SIZE
            tl.store(to.to(tl.pointer_type(tl.float32)) + which * SIZE + d, mean, mask=there)


@jit
def num_evicted(before, windowed, sinks, window, ratio, BLOCK: tl.constexpr):
    """Positions behind the sinks that tokens with ``before`` positions before them do not see: whole blocks."""
    longest = window + before * 0
    if ratio > 0:
        longest = tl.maximum(before // ratio, window)
    return tl.where(windowed, tl.maximum((before - longest) // BLOCK - sinks, 0) * BLOCK, 0)


@jit
def compensation(q, cache, table, gap, sinks, scale, block_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, d):
    """What is left out, as one more position: logits with its weight (-inf if nothing is), weights, values."""
    some = gap > 0
    known = some[:, None] & (d < SIZE)[None, :]
    block = tl.load(table + sinks + gap // BLOCK, mask=some, other=0).to(tl.int64)
    means = (cache + block * block_stride + BLOCK * 2 * SIZE).to(tl.pointer_type(tl.float32))[:, None] + d[None, :]
    product = tl.sum(q.to(tl.float32) * tl.load(means, mask=known, other=0.0), 1)
    logit = product * scale + tl.log(tl.maximum(gap, 1).to(tl.float32))
    return (
        tl.where(some, logit, -float("inf")),
        tl.where(some, 1.0, 0.0),
        tl.load(means + SIZE, mask=known, other=0.0),
    )


@jit
def windowed_attention_kernel(
    query,
    where,
    starts,
    seq_lens,
    in_prompt,
    parts,
    tops,
    totals,
    scale,
    query_stride,
    block_stride,
    tiles,
    sinks,  # blocks
    window,
    ratio,
    HEADS: tl.constexpr,  # query heads
    SHARE: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile; TOKENS * SHARE rows of ROWS are used
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,  # nothing is left out in prompts
    COMPENSATION: tl.constexpr,
):
    """A part of the attention of a tile of query tokens to what their windows leave; merged by `merge`."""
    request, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, part = tl.program_id(1), tl.program_id(2)
    start, context = tl.load(starts + request), tl.load(seq_lens + request)
    length = tl.load(starts + request + 1) - start
    first = tile * TOKENS
    if first < length:
        cache, table, row, windowed = load_head(where, kv_head, query)
        table += request * row
        i, d = tl.arange(0, ROWS), tl.arange(0, SIZE_PADDED)
        token = tl.minimum(first + i // SHARE, length - 1)  # rows behind the last repeat it, and are not stored
        mine = (i < TOKENS * SHARE) & (first + i // SHARE < length)
        head = kv_head * SHARE + i % SHARE
        there = d < SIZE
        q = tl.load(
            query + (start + token).to(tl.int64)[:, None] * query_stride + head[:, None] * SIZE + d[None, :],
            mask=mine[:, None] & there[None, :],
            other=0.0,
        )
        before = context - length + token  # positions before each token
        gap = num_evicted(before, windowed, sinks, window, ratio, BLOCK)
        if EXACT:
            gap = tl.where(tl.load(in_prompt + request) != 0, 0, gap)
        least = tl.min(gap, 0)
        edge = sinks * BLOCK
        count = tl.max(before, 0) + 1 - least  # positions to look at

        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, SIZE_PADDED], tl.float32)
        if COMPENSATION:
            mine_only = tl.where(part == 0, gap, 0)
            top, total, mixed = compensation(q, cache, table, mine_only, sinks, scale, block_stride, SIZE, BLOCK, d)

        each = tl.cdiv(tl.cdiv(count, tl.num_programs(2)), TILE) * TILE
        for begin in range(part * each, tl.minimum(part * each + each, count), TILE):
            seen = begin + tl.arange(0, TILE)
            position = tl.where(seen < edge, seen, seen + least)
            inside = seen < count
            block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
            at = cache + block * block_stride + (position % BLOCK) * 2 * SIZE
            k = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            dropped = (position[None, :] >= edge) & (position[None, :] < edge + gap[:, None])
            x = tl.where((position[None, :] <= before[:, None]) & inside[None, :] & ~dropped, x, -float("inf"))
            v = tl.load(at[:, None] + SIZE + d[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            top, total, mixed = online_softmax_step(x, v, top, total, mixed)

        to = ((start + token).to(tl.int64) * HEADS + head) * tl.num_programs(2) + part
        tl.store(parts + to[:, None] * SIZE + d[None, :], mixed, mask=mine[:, None] & there[None, :])
        tl.store(tops + to, top, mask=mine)
        tl.store(totals + to, total, mask=mine)


@jit
def merge_splits_kernel(
    parts,
    tops,
    totals,
    output,
    count,
    output_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """Merge the parts of one token and head by log-sum-exp, in their order."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, SIZE_PADDED)
    base = (token * HEADS + head) * count
    merged = merge_splits(parts, tops, totals, base, count, d, SIZE, SIZE_PADDED)
    to = output + token * output_stride + head * SIZE + d
    tl.store(to, merged.to(output.dtype.element_ty), mask=d < SIZE)
