"""Triton kernels of `device_tree_triton`."""

from typing import Any, cast

import triton
import triton.language as tl

jit = cast(Any, triton.jit)


@jit(do_not_specialize=["num_reqs", "longest"])  # they change from step to step
def describe_trees_kernel(
    idx_mapping,
    cu_num_logits,
    logits_indices,
    positions,  # [tokens]; those of nodes are overwritten
    parents,  # [max_num_reqs, MAX_NODES]
    numbers,  # as `tree_triton.tree_attention_kernel` takes it, like the next two
    bits,
    rows,
    num_reqs,
    longest,
    bits_stride,
    MAX_NODES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the attention mask of one request's tree, and the positions of its nodes by their depth."""
    request = tl.program_id(0)
    row = tl.arange(0, ROWS)
    inside = request < num_reqs
    first = tl.load(cu_num_logits + request, mask=inside, other=0)
    nodes = tl.load(cu_num_logits + request + 1, mask=inside, other=1) - first - 1
    start = tl.zeros([ROWS], tl.int32) - 1
    if nodes > 0:
        token = tl.load(logits_indices + first).to(tl.int32)
        root = tl.load(positions + token)
        of_request = parents + tl.load(idx_mapping + request).to(tl.int64) * MAX_NODES
        used = row <= nodes
        ancestor = tl.where(used, row - 1, -1)
        mask = (tl.full([ROWS], 1, tl.int64) << row.to(tl.int64)) | 1
        depth = tl.zeros([ROWS], tl.int32)
        while tl.max(ancestor, axis=0) >= 0:
            above = tl.load(of_request + ancestor, mask=ancestor >= 0, other=-1)
            mask = mask | (tl.full([ROWS], 1, tl.int64) << (above + 1).to(tl.int64))
            depth += (ancestor >= 0).to(tl.int32)
            ancestor = above
        tl.store(positions + token + row, root + depth, mask=used)
        words = (nodes + 32) // 32
        to = bits + request * bits_stride + row * words
        tl.store(to, (mask & 0xFFFFFFFF).to(tl.int32), mask=used)
        tl.store(to + 1, (mask >> 32).to(tl.int32), mask=used & (row * 0 + words > 1))
        start = tl.where(used, token + row, -1)
        tl.store(numbers + request * 6, request)
        tl.store(numbers + request * 6 + 1, token)
        tl.store(numbers + request * 6 + 2, root.to(tl.int32))
        tl.store(numbers + request * 6 + 4, request * bits_stride)
        tl.store(numbers + request * 6 + 5, request * longest)
    tl.store(numbers + request * 6 + 3, tl.where(nodes > 0, nodes + 1, 0))
    tl.store(rows + request * longest + row, start, mask=row < longest)


@jit
def accept_trees_kernel(
    sampled,
    drafted,
    cu_num_logits,
    idx_mapping,
    parents,
    tokens,  # [requests, MAX_NODES + 1] int64; output, like all that follow
    counts,
    paths,
    row_parents,
    accepted,
    path_rows,
    MAX_NODES: tl.constexpr,
    NODES_PADDED: tl.constexpr,
):
    """Walk down one request's tree, at each node to the child that has the sampled token."""
    request = tl.program_id(0)
    first = tl.load(cu_num_logits + request)
    nodes = tl.load(cu_num_logits + request + 1) - first - 1
    node = tl.arange(0, NODES_PADDED)
    used = node < nodes
    of_request = parents + tl.load(idx_mapping + request).to(tl.int64) * MAX_NODES
    parent = tl.load(of_request + node, mask=used, other=-2)
    draft = tl.load(drafted + first + 1 + node, mask=used, other=-1)
    path, on_path = tl.zeros([NODES_PADDED], tl.int32) - 1, tl.zeros([NODES_PADDED], tl.int32)
    token = tl.load(sampled + first)
    tl.store(tokens + request * (MAX_NODES + 1), token)
    count, at = 1, -1
    going = 1
    while going > 0:
        fits = (parent == at) & (draft == token) & used
        child = tl.min(tl.where(fits, node, NODES_PADDED), axis=0)
        going = (child < NODES_PADDED).to(tl.int32)
        if going > 0:
            path = tl.where(node == count - 1, child, path)
            on_path = tl.where(node == child, 1, on_path)
            token = tl.load(sampled + first + 1 + child)
            tl.store(tokens + request * (MAX_NODES + 1) + count, token)
            count += 1
            at = child
    tl.store(counts + request, count)
    tl.store(paths + request * MAX_NODES + node, path, mask=node < MAX_NODES)
    tl.store(row_parents + first, -1)
    tl.store(row_parents + first + 1 + node, parent + 1, mask=used)
    tl.store(accepted + first, 1)
    tl.store(accepted + first + 1 + node, on_path, mask=used)
    tl.store(path_rows + first, first)
    tl.store(path_rows + first + 1 + node, first + 1 + tl.where(path >= 0, path, node), mask=used)


@jit
def move_accepted_kernel(
    caches,  # [layers] addresses
    slots,
    cu_num_logits,
    logits_indices,
    counts,
    paths,
    block_stride,
    head_stride,
    token_stride,
    MAX_NODES: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Move the keys and values of one request's accepted nodes, in one head of one layer.

    The nodes of a path have ascending indices, so no token is overwritten before it is read.
    """
    request, head = tl.program_id(0), tl.program_id(2)
    count = tl.load(counts + request) - 1
    if count > 0:
        cache = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(ELEMENT)) + head.to(tl.int64) * head_stride
        start = tl.load(logits_indices + tl.load(cu_num_logits + request)) + 1
        d = tl.arange(0, SIZE_PADDED)
        for i in range(count):
            node = tl.load(paths + request * MAX_NODES + i)
            if node != i:
                source, target = tl.load(slots + start + node), tl.load(slots + start + i)
                read = cache + source // BLOCK * block_stride + source % BLOCK * token_stride
                write = cache + target // BLOCK * block_stride + target % BLOCK * token_stride
                tl.store(write + d, tl.load(read + d, mask=d < SIZE), mask=d < SIZE)
