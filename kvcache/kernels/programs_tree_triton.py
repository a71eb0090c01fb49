"""Triton kernels of `tree_triton`."""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_triton import cache_offsets, merge_splits, online_softmax_step

jit = cast(Any, triton.jit)


@jit
def tree_attention_kernel(
    query,
    cache,
    table,
    trees,  # [count, 6] int32: request, root's row, tokens before it, tree size, offsets into ``bits`` and ``parts``
    bits,
    parts,
    tops,
    totals,
    scale,
    query_stride,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    tiles,
    HEADS: tl.constexpr,  # number of query heads
    NUM_QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # query tokens in a tile; TOKENS * NUM_QUERIES_PER_KV of ROWS rows are used
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute tree attention of a tile of query tokens over one split of the context.

    `merge_tree_splits_kernel` merges the splits.
    """
    tree, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, part = tl.program_id(1), tl.program_id(2)
    at_tree = trees + tree * 6
    start, before, length = tl.load(at_tree + 1), tl.load(at_tree + 2), tl.load(at_tree + 3)
    first = tile * TOKENS
    if first < length:
        table += tl.load(at_tree).to(tl.int64) * table_stride
        cache += kv_head.to(tl.int64) * head_stride
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
        own_bits = bits + tl.load(at_tree + 4) + token * ((length + 31) // 32)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, HEAD_SIZE_PADDED], tl.float32)
        # The tokens before the tree, which every query token attends to.
        each = tl.cdiv(tl.cdiv(before, tl.num_programs(2)), TILE) * TILE
        for begin in range(part * each, tl.minimum(part * each + each, before), TILE):
            position = begin + tl.arange(0, TILE)
            inside = position < before
            at = cache + cache_offsets(table, position, inside, block_stride, token_stride, BLOCK)
            k = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            x = tl.where(inside[None, :], x, -float("inf"))
            v = tl.load(at[:, None] + HEAD_SIZE + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            top, total, mixed = online_softmax_step(x, v, top, total, mixed)
        # The tokens of the tree, which are visible to their descendants only; the first split reads them.
        for begin in range(0, tl.where(part == 0, length, 0), TILE):
            node = begin + tl.arange(0, TILE)
            inside = node < length
            at = cache + cache_offsets(table, before + node, inside, block_stride, token_stride, BLOCK)
            k = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            word = tl.load(own_bits[:, None] + node[None, :] // 32, mask=inside[None, :], other=0)
            x = tl.where(((word >> (node % 32)[None, :]) & 1) != 0, x, -float("inf"))
            v = tl.load(at[:, None] + HEAD_SIZE + d[None, :], mask=inside[:, None] & d_mask[None, :], other=0.0)
            top, total, mixed = online_softmax_step(x, v, top, total, mixed)

        to = ((tl.load(at_tree + 5) + token).to(tl.int64) * HEADS + head) * tl.num_programs(2) + part
        tl.store(parts + to[:, None] * HEAD_SIZE + d[None, :], mixed, mask=row_mask[:, None] & d_mask[None, :])
        tl.store(tops + to, top, mask=row_mask)
        tl.store(totals + to, total, mask=row_mask)


@jit
def merge_tree_splits_kernel(
    parts,
    tops,
    totals,
    rows,
    output,
    count,
    output_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Merge the splits of one tree token and head by log-sum-exp."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(rows + row).to(tl.int64)
    if token >= 0:
        d = tl.arange(0, HEAD_SIZE_PADDED)
        base = (row * HEADS + head) * count
        merged = merge_splits(parts, tops, totals, base, count, d, HEAD_SIZE, HEAD_SIZE_PADDED, SPLITS_AT_ONCE)
        to = output + token * output_stride + head * HEAD_SIZE + d
        tl.store(to, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)
