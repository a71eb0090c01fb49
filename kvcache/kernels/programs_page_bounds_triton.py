"""Triton kernels of `page_bounds_triton`: programs over written tokens, and over requests, heads and pages."""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_triton import (
    add_to_log_sum_exp,
    load_query,
    load_request,
    log_sum_exp_of_splits,
    store_log_sum_exp,
)

jit = cast(Any, triton.jit)


@jit
def update_bounds_kernel(
    cache,
    slots,
    bounds,
    count,
    block_stride,
    head_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the bounds of the block that holds a written token, from its keys up to the last written one.

    ``bounds`` is [blocks, KV heads, 2, head size].
    """
    i, kv_head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + i)
    following = tl.load(slots + i + 1, mask=i + 1 < count, other=-1)
    block = slot // BLOCK
    if (slot >= 0) & ((following <= slot) | (following // BLOCK != block)):
        t, d = tl.arange(0, BLOCK), tl.arange(0, HEAD_SIZE_PADDED)
        keys = cache + block * block_stride + kv_head.to(tl.int64) * head_stride + t * token_stride
        inside = (t <= slot % BLOCK)[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(keys[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        to = bounds + (block * KV_HEADS + kv_head) * 2 * HEAD_SIZE + d
        tl.store(to, tl.min(tl.where(inside, k, float("inf")), 0), mask=d < HEAD_SIZE)
        tl.store(to + HEAD_SIZE, tl.max(tl.where(inside, k, -float("inf")), 0), mask=d < HEAD_SIZE)


@jit
def bound_products(
    q,
    bounds,
    table,
    page,
    context,
    kv_head,
    d,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Return the largest products [rows, pages] of queries [rows, head size] with a key of each page, by its bounds."""
    low = tl.full([page.shape[0], d.shape[0]], float("inf"), tl.float32)
    high = tl.full([page.shape[0], d.shape[0]], -float("inf"), tl.float32)
    for i in tl.static_range(PAGE // BLOCK):
        number = page * (PAGE // BLOCK) + i
        inside = number * BLOCK < context
        block = tl.load(table + number, mask=inside, other=0).to(tl.int64)
        at = bounds + ((block * KV_HEADS + kv_head) * 2 * HEAD_SIZE)[:, None] + d[None, :]
        known = inside[:, None] & (d < HEAD_SIZE)[None, :]
        low = tl.minimum(low, tl.load(at, mask=known, other=float("inf")).to(tl.float32))
        high = tl.maximum(high, tl.load(at + HEAD_SIZE, mask=known, other=-float("inf")).to(tl.float32))
    known = (page * PAGE < context)[:, None] & (d < HEAD_SIZE)[None, :]
    low, high = tl.where(known, low, 0.0).to(q.dtype), tl.where(known, high, 0.0).to(q.dtype)
    zero = tl.zeros_like(q)
    x = tl.dot(tl.maximum(q, zero), tl.trans(high), input_precision="ieee")
    return x + tl.dot(tl.minimum(q, zero), tl.trans(low), input_precision="ieee")


@jit
def bound_lse_kernel(
    query,
    bounds,
    table,
    starts,
    seq_lens,
    split_lse,
    scale,
    budget,
    query_stride,
    table_stride,
    HEADS: tl.constexpr,  # number of query heads
    KV_HEADS: tl.constexpr,
    NUM_QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,  # NUM_QUERIES_PER_KV, padded
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the log-sum-exp of the bounds of the pages of one split of a context.

    ``split_lse`` is [requests, heads, splits]; the value of a split without pages is -inf.
    """
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, context, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        g, d = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED)
        q = load_query(query, row, kv_head * NUM_QUERIES_PER_KV, NUM_QUERIES_PER_KV, query_stride, g, d, HEAD_SIZE)
        table += request * table_stride
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        pages = tl.cdiv(context, PAGE)
        each = tl.cdiv(tl.cdiv(pages, tl.num_programs(2)), TILE) * TILE
        for tile in range(split * each, tl.minimum(split * each + each, pages), TILE):
            page = tile + tl.arange(0, TILE)
            x = bound_products(q, bounds, table, page, context, kv_head, d, KV_HEADS, HEAD_SIZE, BLOCK, PAGE)
            x = tl.where((page < pages)[None, :], x * scale, -float("inf"))
            top, total = add_to_log_sum_exp(top, total, x)  # every tile has a page
        to = split_lse + (request.to(tl.int64) * HEADS + kv_head * NUM_QUERIES_PER_KV + g) * tl.num_programs(2) + split
        store_log_sum_exp(to, top, total, g < NUM_QUERIES_PER_KV)


@jit
def page_weights_kernel(
    query,
    bounds,
    table,
    starts,
    seq_lens,
    split_lse,
    result,
    scale,
    budget,
    pages_stride,
    splits,
    query_stride,
    table_stride,
    HEADS: tl.constexpr,  # number of query heads
    KV_HEADS: tl.constexpr,
    NUM_QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,  # NUM_QUERIES_PER_KV, padded
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,  # splits, padded
):
    """Compute the weight of each page: a softmax over the bounds of each head, then the maximum over the heads.

    ``result`` is [requests, pages]; pages beyond a context are not written.
    """
    request = tl.program_id(0)
    row, context, sparse = load_request(starts, seq_lens, request, budget)
    if sparse:
        g, d, s = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE_PADDED), tl.arange(0, SPLITS_PADDED)
        table += request * table_stride
        pages = tl.cdiv(context, PAGE)
        for tile in range(tl.program_id(1) * TILE, pages, tl.num_programs(1) * TILE):
            page = tile + tl.arange(0, TILE)
            weight = tl.zeros([TILE], tl.float32)
            for kv_head in range(KV_HEADS):
                first = kv_head * NUM_QUERIES_PER_KV
                q = load_query(query, row, first, NUM_QUERIES_PER_KV, query_stride, g, d, HEAD_SIZE)
                lse = log_sum_exp_of_splits(
                    split_lse, request.to(tl.int64) * HEADS + first + g, g < NUM_QUERIES_PER_KV, s, splits
                )
                x = bound_products(q, bounds, table, page, context, kv_head, d, KV_HEADS, HEAD_SIZE, BLOCK, PAGE)
                inside = (g < NUM_QUERIES_PER_KV)[:, None] & (page < pages)[None, :]
                weight = tl.maximum(weight, tl.max(tl.where(inside, tl.exp(x * scale - lse[:, None]), 0.0), 0))
            tl.store(result + request.to(tl.int64) * pages_stride + page, weight, mask=page < pages)
