"""Triton kernels of `paged_triton`: programs over requests, heads and parts of a context."""

from typing import Any, cast

import triton
import triton.language as tl

jit = cast(Any, triton.jit)


@jit
def is_sparse(starts, seq_lens, request, budget):
    """Return a request's first query row, its context length, and whether it decodes one token beyond the budget."""
    row = tl.load(starts + request)
    context = tl.load(seq_lens + request)
    return row, context, (tl.load(starts + request + 1) - row == 1) & (context > budget)


@jit
def unit_scores_kernel(
    query,
    cache,
    table,
    starts,
    seq_lens,
    scores,
    scale,
    budget,
    units,
    query_stride,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    HEADS: tl.constexpr,  # number of query heads
    NUM_QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,  # NUM_QUERIES_PER_KV, padded
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the log-sum-exp of the scaled query-key products of every unit to ``scores`` [requests, heads, units].

    The value of units beyond a request's context is -inf.
    """
    request, kv_head = tl.program_id(0), tl.program_id(1)
    row, context, sparse = is_sparse(starts, seq_lens, request, budget)
    if sparse:
        g, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        head = kv_head * NUM_QUERIES_PER_KV + g
        q = tl.load(
            query + row.to(tl.int64) * query_stride + head[:, None] * HEAD_SIZE + d[None, :],
            mask=(g < NUM_QUERIES_PER_KV)[:, None] & (d < HEAD_SIZE)[None, :],
            other=0.0,
        )
        begin = tl.program_id(2) * SPLIT
        for tile in range(begin, min(begin + SPLIT, units * UNIT), TILE):
            position = tile + tl.arange(0, TILE)
            inside = position < context
            block = tl.load(table + request * table_stride + position // BLOCK, mask=inside, other=0).to(tl.int64)
            at = block * block_stride + kv_head * head_stride + (position % BLOCK) * token_stride
            k = tl.load(cache + at[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            x = tl.where(inside[None, :], x, -float("inf"))
            if UNIT == 1:
                unit = position
                value = x
            else:
                unit = tile // UNIT + tl.arange(0, TILE // UNIT)
                x = tl.reshape(x, (ROWS, TILE // UNIT, UNIT))
                top = tl.max(x, 2)
                some = tl.where(top == -float("inf"), 0.0, top)
                value = some + tl.log(tl.sum(tl.exp(x - some[:, :, None]), 2))
            to = scores + (request.to(tl.int64) * HEADS + head[:, None]) * units + unit[None, :]
            tl.store(to, value, mask=(g < NUM_QUERIES_PER_KV)[:, None] & (unit < units)[None, :])


@jit
def token_scores_kernel(
    scores,
    totals,
    least,
    starts,
    seq_lens,
    result,
    budget,
    units,
    HEADS: tl.constexpr,
    NUM_HEAD_GROUPS: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute the attention weight of each unit: a softmax for each head, then the sum or maximum over a head group."""
    request, head_group = tl.program_id(0), tl.program_id(1)
    _, _, sparse = is_sparse(starts, seq_lens, request, budget)
    if sparse:
        unit = tl.program_id(2) * TILE + tl.arange(0, TILE)
        weight = tl.zeros([TILE], tl.float32)
        for i in range(HEADS // NUM_HEAD_GROUPS):
            head = request.to(tl.int64) * HEADS + head_group * (HEADS // NUM_HEAD_GROUPS) + i
            x = tl.load(scores + head * units + unit, mask=unit < units, other=-float("inf"))
            p = tl.exp(x - tl.load(totals + head))
            p = tl.where(x >= tl.load(least + head), p, 0.0)
            weight = tl.maximum(weight, p) if TAKE_MAX else weight + p
        tl.store(
            result + (request.to(tl.int64) * NUM_HEAD_GROUPS + head_group) * units + unit,
            weight,
            mask=unit < units,
        )


@jit
def shorten_block_table_kernel(
    table,
    kept,
    starts,
    seq_lens,
    short_table,
    short_lens,
    budget,
    pages,
    table_stride,
    short_stride,
    PAGE_BLOCKS: tl.constexpr,  # blocks in a page
    PAGE: tl.constexpr,  # tokens in a page
    TILE: tl.constexpr,
):
    """Copy a request's block table and sequence length; for sparse requests, with the selected pages only."""
    request = tl.program_id(0)
    _, context, sparse = is_sparse(starts, seq_lens, request, budget)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    length = context
    source = slot
    if sparse:
        page = tl.load(kept + request * pages + slot // PAGE_BLOCKS, mask=slot // PAGE_BLOCKS < pages, other=0)
        source = page * PAGE_BLOCKS + slot % PAGE_BLOCKS
        last = tl.load(kept + request * pages + pages - 1)
        length = (pages - 1) * PAGE + context - last * PAGE
    inside = slot * (PAGE // PAGE_BLOCKS) < length
    tl.store(
        short_table + request * short_stride + slot,
        tl.load(table + request * table_stride + source, mask=inside, other=0),
        mask=inside,
    )
    if tl.program_id(1) == 0:
        tl.store(short_lens + request, length)


@jit
def sparse_decode_kernel(
    query,
    cache,
    table,
    starts,
    seq_lens,
    kept,
    parts,
    tops,
    totals,
    scale,
    budget,
    units,
    query_stride,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    HEADS: tl.constexpr,
    NUM_QUERIES_PER_KV: tl.constexpr,
    TOGETHER: tl.constexpr,  # query heads in a program: NUM_QUERIES_PER_KV, or 1 if each has its own selection
    ROWS: tl.constexpr,  # TOGETHER, padded
    NUM_HEAD_GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute attention over one tile of a request's selected tokens.

    `merge_decode_splits_kernel` merges the tiles.
    """
    request, program, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, context, sparse = is_sparse(starts, seq_lens, request, budget)
    if sparse:
        first = program * TOGETHER
        kv_head = first // NUM_QUERIES_PER_KV
        g, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        q = tl.load(
            query + row.to(tl.int64) * query_stride + (first + g)[:, None] * HEAD_SIZE + d[None, :],
            mask=(g < TOGETHER)[:, None] & (d < HEAD_SIZE)[None, :],
            other=0.0,
        )
        slot = part * TILE + tl.arange(0, TILE)
        head_group = first * NUM_HEAD_GROUPS // HEADS
        unit = tl.load(
            kept + (request * NUM_HEAD_GROUPS + head_group) * units + slot // UNIT, mask=slot // UNIT < units, other=0
        )
        position = unit * UNIT + slot % UNIT
        inside = (slot // UNIT < units) & (position < context)
        block = tl.load(table + request * table_stride + position // BLOCK, mask=inside, other=0).to(tl.int64)
        at = block * block_stride + kv_head * head_stride + (position % BLOCK) * token_stride
        kv_mask = inside[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(cache + at[:, None] + d[None, :], mask=kv_mask, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        x = tl.where(inside[None, :], x, -float("inf"))
        top = tl.max(x, 1)
        some = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp(x - some[:, None])
        v = tl.load(cache + at[:, None] + HEAD_SIZE + d[None, :], mask=kv_mask, other=0.0)
        mixed = tl.dot(p.to(v.dtype), v, input_precision="ieee").to(tl.float32)
        to = (request.to(tl.int64) * HEADS + first + g) * tl.num_programs(2) + part
        row_mask = g < TOGETHER
        tl.store(parts + to[:, None] * HEAD_SIZE + d[None, :], mixed, mask=row_mask[:, None] & (d < HEAD_SIZE)[None, :])
        tl.store(tops + to, top, mask=row_mask)
        tl.store(totals + to, tl.sum(p, 1), mask=row_mask)


@jit
def online_softmax_step(x, v, top, total, mixed):
    """Update an online softmax with scores [rows, positions], -inf where masked, and values [positions, head_size]."""
    now = tl.maximum(top, tl.max(x, 1))
    some = tl.where(now == -float("inf"), 0.0, now)
    factor = tl.exp(top - some)
    p = tl.exp(x - some[:, None])
    mixed = mixed * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee").to(tl.float32)
    return now, total * factor + tl.sum(p, 1), mixed


@jit
def merge_splits(parts, tops, totals, base, count, d, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr):
    """Merge the ``count`` splits of one head by log-sum-exp, in their order."""
    top = -float("inf")
    for i in range(count):
        top = tl.maximum(top, tl.load(tops + base + i))
    total = 0.0
    mixed = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
    for i in range(count):
        weight = tl.exp(tl.load(tops + base + i) - top)
        total += weight * tl.load(totals + base + i)
        mixed += weight * tl.load(parts + (base + i) * HEAD_SIZE + d, mask=d < HEAD_SIZE, other=0.0)
    return mixed / total


@jit
def merge_decode_splits_kernel(
    parts,
    tops,
    totals,
    starts,
    seq_lens,
    output,
    budget,
    count,
    output_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
):
    """Merge the splits of one request and head by log-sum-exp, in their order."""
    request, head = tl.program_id(0), tl.program_id(1)
    row, _, sparse = is_sparse(starts, seq_lens, request, budget)
    if sparse:
        d = tl.arange(0, HEAD_SIZE_PADDED)
        base = (request.to(tl.int64) * HEADS + head) * count
        merged = merge_splits(parts, tops, totals, base, count, d, HEAD_SIZE, HEAD_SIZE_PADDED)
        to = output + row.to(tl.int64) * output_stride + head * HEAD_SIZE + d
        tl.store(to, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)
