"""Triton kernels of `paged_triton`: programs over requests, heads and parts of a context."""

from typing import Any, cast

import triton
import triton.language as tl

jit = cast(Any, triton.jit)


@jit
def load_request(starts, seq_lens, request, budget):
    """Return the index of a request's first query token, its context length, and whether it is sparse.

    A sparse request has one query token, and a context longer than the budget.
    """
    row = tl.load(starts + request)
    context = tl.load(seq_lens + request)
    return row, context, (tl.load(starts + request + 1) - row == 1) & (context > budget)


@jit
def load_query(query, row, first, count, query_stride, g, d, HEAD_SIZE: tl.constexpr):
    """Return ``count`` query heads of one token from head ``first`` on, zero-padded to [rows, padded head size]."""
    return tl.load(
        query + row.to(tl.int64) * query_stride + (first + g)[:, None] * HEAD_SIZE + d[None, :],
        mask=(g < count)[:, None] & (d < HEAD_SIZE)[None, :],
        other=0.0,
    )


@jit
def cache_offsets(table, position, inside, block_stride, token_stride, BLOCK: tl.constexpr):
    """Return the offsets [positions] int64 of tokens in the cache, by the block table of their request."""
    block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
    return block * block_stride + (position % BLOCK) * token_stride


@jit
def log_sum_exp_of_splits(split_lse, head, some, s, splits):
    """Return the log-sum-exp [rows] of heads from that of their splits; ``some`` are the rows that are not padding."""
    of_split = tl.load(
        split_lse + head[:, None] * splits + s[None, :],
        mask=some[:, None] & (s < splits)[None, :],
        other=-float("inf"),
    )
    top = tl.where(some, tl.max(of_split, 1), 0.0)
    return top + tl.log(tl.maximum(tl.sum(tl.exp(of_split - top[:, None]), 1), 1e-30))


@jit
def add_to_log_sum_exp(top, total, x):
    """Return the running maximum and total [rows] of a log-sum-exp after some logits [rows, columns].

    Every row of the logits has a finite one.
    """
    now = tl.maximum(top, tl.max(x, 1))
    return now, total * tl.exp(top - now) + tl.sum(tl.exp(x - now[:, None]), 1)


@jit
def store_log_sum_exp(to, top, total, mask):
    """Write a log-sum-exp from its running maximum and total; -inf if there were no logits."""
    some = total > 0
    tl.store(to, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), -float("inf")), mask=mask)


@jit
def score_lse_kernel(
    query,
    cache,
    table,
    starts,
    seq_lens,
    split_lse,
    scale,
    budget,
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
    TILE: tl.constexpr,
):
    """Write the log-sum-exp of the scaled query-key products of one split of a context.

    ``split_lse`` is [requests, heads, splits]; the value of a split without tokens is -inf.
    """
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, context, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        g, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        head = kv_head * NUM_QUERIES_PER_KV + g
        q = load_query(query, row, kv_head * NUM_QUERIES_PER_KV, NUM_QUERIES_PER_KV, query_stride, g, d, HEAD_SIZE)
        cache += kv_head.to(tl.int64) * head_stride
        table += request * table_stride
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        each = tl.cdiv(tl.cdiv(context, tl.num_programs(2)), TILE) * TILE
        for tile in range(split * each, tl.minimum(split * each + each, context), TILE):
            position = tile + tl.arange(0, TILE)
            inside = position < context
            at = cache_offsets(table, position, inside, block_stride, token_stride, BLOCK)
            k = tl.load(cache + at[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            x = tl.where(inside[None, :], x, -float("inf"))
            top, total = add_to_log_sum_exp(top, total, x)  # every tile has a token
        to = split_lse + (request.to(tl.int64) * HEADS + head) * tl.num_programs(2) + split
        store_log_sum_exp(to, top, total, g < NUM_QUERIES_PER_KV)


@jit
def unit_weights_kernel(
    query,
    cache,
    table,
    starts,
    seq_lens,
    split_lse,
    result,
    scale,
    budget,
    units,
    splits,
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
    UNIT: tl.constexpr,  # tokens in a unit
    TILE: tl.constexpr,
    KV_HEADS_PER_GROUP: tl.constexpr,  # KV heads whose query heads share a row of ``result``
    SPLITS_PADDED: tl.constexpr,  # splits, padded
    PER_HEAD: tl.constexpr,  # every query head has a row of ``result``
    TAKE_MAX: tl.constexpr,  # largest weight of the heads instead of their sum
):
    """Compute the attention weight of each unit of a context: a softmax for each head, then the sum or maximum.

    The query-key products are computed a second time instead of being stored by `score_lse_kernel`, because they
    would take gigabytes for long contexts. ``result`` is [requests, head groups, units]; units beyond a context are not
    written.
    """
    request, group = tl.program_id(0), tl.program_id(1)
    row, context, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        g, d, s = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED), tl.arange(0, SPLITS_PADDED)
        table += request * table_stride
        for tile in range(tl.program_id(2) * TILE, context, tl.num_programs(2) * TILE):
            position = tile + tl.arange(0, TILE)
            inside = position < context
            at = cache_offsets(table, position, inside, block_stride, token_stride, BLOCK)
            unit = tile // UNIT + tl.arange(0, TILE // UNIT)
            weight = tl.zeros([TILE], tl.float32)
            for i in range(KV_HEADS_PER_GROUP):
                first = (group * KV_HEADS_PER_GROUP + i) * NUM_QUERIES_PER_KV
                q = load_query(query, row, first, NUM_QUERIES_PER_KV, query_stride, g, d, HEAD_SIZE)
                head = request.to(tl.int64) * HEADS + first + g
                lse = log_sum_exp_of_splits(split_lse, head, g < NUM_QUERIES_PER_KV, s, splits)
                to = cache + (group * KV_HEADS_PER_GROUP + i).to(tl.int64) * head_stride + at
                k = tl.load(to[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)
                x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
                p = tl.where((g < NUM_QUERIES_PER_KV)[:, None] & inside[None, :], tl.exp(x - lse[:, None]), 0.0)
                if PER_HEAD:
                    of_unit = tl.sum(tl.reshape(p, (ROWS, TILE // UNIT, UNIT)), 2)
                    tl.store(
                        result + head[:, None] * units + unit[None, :],
                        of_unit,
                        mask=(g < NUM_QUERIES_PER_KV)[:, None] & (unit < units)[None, :],
                    )
                elif TAKE_MAX:
                    weight = tl.maximum(weight, tl.max(p, 0))
                else:
                    weight += tl.sum(p, 0)
            if not PER_HEAD:
                tl.store(
                    result + (request.to(tl.int64) * tl.num_programs(1) + group) * units + unit,
                    tl.sum(tl.reshape(weight, (TILE // UNIT, UNIT)), 1),
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
    _, context, sparse = load_request(starts, seq_lens, request, budget)
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
    row, context, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        first = program * TOGETHER
        kv_head = first // NUM_QUERIES_PER_KV
        g, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        q = load_query(query, row, first, TOGETHER, query_stride, g, d, HEAD_SIZE)
        slot = part * TILE + tl.arange(0, TILE)
        head_group = first * NUM_HEAD_GROUPS // HEADS
        unit = tl.load(
            kept + (request * NUM_HEAD_GROUPS + head_group) * units + slot // UNIT, mask=slot // UNIT < units, other=0
        )
        position = unit * UNIT + slot % UNIT
        inside = (slot // UNIT < units) & (position < context)
        at = kv_head * head_stride + cache_offsets(
            table + request * table_stride, position, inside, block_stride, token_stride, BLOCK
        )
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
def merge_splits(
    parts,
    tops,
    totals,
    base,
    count,
    d,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Merge the ``count`` splits of one head by log-sum-exp; the sums of a split whose top is -inf are not read."""
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
    for begin in range(0, count, SPLITS_AT_ONCE):
        i = begin + tl.arange(0, SPLITS_AT_ONCE)
        tops_of_splits = tl.load(tops + base + i, mask=i < count, other=-float("inf"))
        some = tops_of_splits > -float("inf")
        now = tl.maximum(top, tl.max(tops_of_splits, 0))
        safe = tl.where(now == -float("inf"), 0.0, now)
        weight = tl.where(some, tl.exp(tops_of_splits - safe), 0.0)
        factor = tl.exp(top - safe)
        part = tl.load(
            parts + (base + i)[:, None] * HEAD_SIZE + d[None, :],
            mask=some[:, None] & (d < HEAD_SIZE)[None, :],
            other=0.0,
        )
        total = total * factor + tl.sum(weight * tl.load(totals + base + i, mask=some, other=0.0), 0)
        mixed = mixed * factor + tl.sum(weight[:, None] * part, 0)
        top = now
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
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Merge the splits of one request and head by log-sum-exp."""
    request, head = tl.program_id(0), tl.program_id(1)
    row, _, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        d = tl.arange(0, HEAD_SIZE_PADDED)
        base = (request.to(tl.int64) * HEADS + head) * count
        merged = merge_splits(parts, tops, totals, base, count, d, HEAD_SIZE, HEAD_SIZE_PADDED, SPLITS_AT_ONCE)
        to = output + row.to(tl.int64) * output_stride + head * HEAD_SIZE + d
        tl.store(to, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)
