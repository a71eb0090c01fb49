"""The Triton kernels behind `tree_triton`."""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_triton import merge_splits, online_softmax_step

jit = cast(Any, triton.jit)


@jit
def tree_attention_kernel(
    query,
    cache,
    table,
    trees,  # [count, 6] int32: request, row of the root, positions before it, tokens, where bits and where parts begin
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
    HEADS: tl.constexpr,  # query heads
    SHARE: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile; TOKENS * SHARE rows of ROWS are used
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A part of the attention of a tile of a tree's tokens to what they see; merged by `merge`."""
    tree, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, part = tl.program_id(1), tl.program_id(2)
    at_tree = trees + tree * 6
    start, before, length = tl.load(at_tree + 1), tl.load(at_tree + 2), tl.load(at_tree + 3)
    first = tile * TOKENS
    if first < length:
        table += tl.load(at_tree).to(tl.int64) * table_stride
        cache += kv_head.to(tl.int64) * head_stride
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
        own_bits = bits + tl.load(at_tree + 4) + token * ((length + 31) // 32)
        count = before + length  # positions to look at

        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, SIZE_PADDED], tl.float32)
        each = tl.cdiv(tl.cdiv(count, tl.num_programs(2)), TILE) * TILE
        for begin in range(part * each, tl.minimum(part * each + each, count), TILE):
            position = begin + tl.arange(0, TILE)
            inside = position < count
            block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
            at = cache + block * block_stride + (position % BLOCK) * token_stride
            k = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            node = tl.maximum(position - before, 0)
            in_tree = inside & (position >= before)
            word = tl.load(own_bits[:, None] + node[None, :] // 32, mask=in_tree[None, :], other=0)
            seen = (position < before)[None, :] | (((word >> (node % 32)[None, :]) & 1) != 0)
            x = tl.where(seen & inside[None, :], x, -float("inf"))
            v = tl.load(at[:, None] + SIZE + d[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            top, total, mixed = online_softmax_step(x, v, top, total, mixed)

        to = ((tl.load(at_tree + 5) + token).to(tl.int64) * HEADS + head) * tl.num_programs(2) + part
        tl.store(parts + to[:, None] * SIZE + d[None, :], mixed, mask=mine[:, None] & there[None, :])
        tl.store(tops + to, top, mask=mine)
        tl.store(totals + to, total, mask=mine)


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
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """Merge the parts of one of the trees' tokens and one head by log-sum-exp, in their order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(rows + row).to(tl.int64)
    d = tl.arange(0, SIZE_PADDED)
    merged = merge_splits(parts, tops, totals, (row * HEADS + head) * count, count, d, SIZE, SIZE_PADDED)
    tl.store(output + token * output_stride + head * SIZE + d, merged.to(output.dtype.element_ty), mask=d < SIZE)
