"""Triton kernels of `adjacency_triton` that read candidates, and that update the tables from the steps of requests.

Contexts are tensors [n, ORDER_PADDED]: column d is the token at distance d from its end. A *row* of
the adjacency table is addressed by its index among the rows of all tables, which follow one another.
"""

from typing import Any, cast

import triton
import triton.language as tl

jit = cast(Any, triton.jit)

NONE: tl.constexpr = tl.constexpr(-1)


@jit
def context_keys(context, LENGTH: tl.constexpr):
    """Return the hashes of the last ``LENGTH`` tokens of contexts [n, ORDER_PADDED], [n]; see `adjacency`."""
    column = tl.arange(0, context.shape[1])
    x = tl.full([context.shape[0]], LENGTH, tl.uint64) * 0xC2B2AE3D27D4EB4F
    for i in tl.static_range(LENGTH):
        token = tl.sum(tl.where(column[None, :] == LENGTH - 1 - i, context, 0), axis=1)
        x = (x ^ token.to(tl.int64).to(tl.uint64, bitcast=True)) * 0x9E3779B97F4A7C15
        x ^= x >> 29
    return (x | 1).to(tl.int64, bitcast=True)


@jit
def context_rows(key, context, table, vocab, num_hashed, LENGTH: tl.constexpr):
    """Return the rows that contexts of ``LENGTH`` tokens own, and the indices of their keys, [n] each."""
    if LENGTH == 1:
        token = tl.sum(tl.where(tl.arange(0, context.shape[1])[None, :] == 0, context, 0), axis=1).to(tl.int64)
        at = tl.zeros_like(key)
        row = tl.where((token >= 0) & (token < vocab), token, 0)
    else:
        at = ((key.to(tl.uint64, bitcast=True) >> 1) & (num_hashed - 1).to(tl.uint64)).to(tl.int64)
        row = vocab + at
    return table * (vocab + num_hashed) + row, table * num_hashed + at


@jit
def find_candidates(
    context,
    available,
    table,
    tokens,
    confidences,
    keys,
    vocab,
    num_hashed,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Return the candidates of the longest known context of each text; see `find_row`.

    The rows of all lengths are read together with the keys that decide between them, so that no read waits for another.

    Args:
        context: [n, ORDER_PADDED] contexts.
        available: [n] number of tokens in each text, which may be fewer than the order.
        table: Index of the table.
        tokens: Candidates of all rows.
        confidences: Their confidences.
        keys: Hashes of the contexts that own the hashed rows.
        vocab: Size of the vocabulary.
        num_hashed: Number of hashed rows of a table.
        K: Number of candidates in a row.
        K_PADDED: The next power of two.
        ORDER: Longest context with its own rows.

    Returns:
        Candidates and their confidences, [n, K_PADDED] int32 each, and the length of the context, [n] int32.
    """
    rank = tl.arange(0, K_PADDED)[None, :]
    key = context_keys(context, 1)
    row, _ = context_rows(key, context, table, vocab, num_hashed, 1)
    slot = row[:, None] * K + rank
    candidate = tl.load(tokens + slot, mask=rank < K, other=NONE)
    confidence = tl.load(confidences + slot, mask=rank < K, other=0)
    length = tl.full([context.shape[0]], 1, tl.int32)
    for i in tl.static_range(ORDER - 1):  # a longer context replaces a shorter one
        key = context_keys(context, i + 2)
        row, at = context_rows(key, context, table, vocab, num_hashed, i + 2)
        slot = row[:, None] * K + rank
        of_longer = tl.load(tokens + slot, mask=rank < K, other=NONE)
        confidence_of_longer = tl.load(confidences + slot, mask=rank < K, other=0)
        known = (available >= i + 2) & (tl.load(keys + at) == key)
        candidate = tl.where(known[:, None], of_longer, candidate)
        confidence = tl.where(known[:, None], confidence_of_longer, confidence)
        length = tl.where(known, i + 2, length)
    return candidate, confidence.to(tl.int32), length


@jit
def count_candidates(
    all_token_ids,
    token_ids_stride,
    req_idx,
    position,
    table,
    tokens,
    confidences,
    keys,
    seen,
    right,
    vocab,
    num_hashed,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    CONFIDENCES: tl.constexpr,
):
    """Count the candidates of the row before a token of a text, and the right one; see `update_acceptance_rates`."""
    text = all_token_ids + req_idx * token_ids_stride + position
    d = tl.arange(0, ORDER_PADDED)
    context = tl.load(text - 1 - d, mask=(d < ORDER) & (d < position), other=0)[None, :]
    candidate, confidence, length = find_candidates(
        context, position, table, tokens, confidences, keys, vocab, num_hashed, K, K_PADDED, ORDER
    )
    rank = tl.arange(0, K_PADDED)[None, :]
    cell = ((table * (ORDER + 1) + length[:, None]) * K + rank) * CONFIDENCES + confidence
    one = tl.full([1, K_PADDED], 1.0, tl.float32)
    tl.atomic_add(seen + cell, one, mask=candidate != NONE)
    tl.atomic_add(right + cell, one, mask=(candidate != NONE) & (candidate == tl.load(text)))


@jit
def refresh_rates(seen, right, rate, block, size, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute a block of the acceptance rates from the counts, and halve counts that have reached ``LIMIT``."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(seen + at, mask=inside, other=1.0)
    correct = tl.load(right + at, mask=inside, other=0.0)
    tl.store(rate + at, correct / total, mask=inside)
    full = inside & (total >= LIMIT)
    tl.store(seen + at, total * 0.5, mask=full)
    tl.store(right + at, correct * 0.5, mask=full)


@jit
def write_turn(request, j, accepted, MAX_NUM_LOGITS: tl.constexpr):
    """Return the turn of a request's ``j``-th position among all of the step, in the order of `update_rows`.

    Requests follow one another; rejected positions come before accepted ones, the first rejected and the deepest
    accepted one last.
    """
    return request * 2 * MAX_NUM_LOGITS + tl.where(accepted, MAX_NUM_LOGITS + j, MAX_NUM_LOGITS - 1 - j)


@jit
def is_accepted(j, count, accepted, logit_idx, TREES: tl.constexpr):
    """Return whether a request's ``j``-th position was accepted, of which ``count`` tokens were sampled."""
    if TREES:
        return tl.load(accepted + logit_idx).to(tl.int32) > 0
    else:
        return j < tl.maximum(count, 1)


@jit
def row_context(
    all_token_ids,
    token_ids_stride,
    req_idx,
    input_ids,
    positions,
    parents,
    logit_idx,
    j,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    TREES: tl.constexpr,
):
    """Return the context that ends at a request's ``j``-th verified token, [1, ORDER_PADDED], and its position.

    Its tokens are the request's verified ones, and before them those of the text.
    """
    position = tl.load(positions + logit_idx)
    # The number of the token's ancestors among the verified ones, which is j in a chain.
    depth = (position - tl.load(positions + logit_idx - j)).to(tl.int32)
    d = tl.arange(0, ORDER_PADDED)
    node = j - d
    if TREES:
        node = tl.zeros([ORDER_PADDED], tl.int32)
        ancestor = j
        for i in tl.static_range(ORDER):
            node = tl.where(d == i, ancestor, node)
            ancestor = tl.load(parents + logit_idx - j + ancestor, mask=i < depth, other=0)
    of_step = tl.load(input_ids + logit_idx - j + node, mask=(d <= depth) & (d < ORDER), other=0)
    before = tl.load(
        all_token_ids + req_idx * token_ids_stride + position - d,
        mask=(d > depth) & (d < ORDER) & (d <= position),
        other=0,
    )
    return tl.where(d <= depth, of_step, before)[None, :], position


@jit
def count_and_claim_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    num_sampled,
    table_of_request,
    cu_num_logits,
    input_ids,
    positions,
    parents,  # of positions, and whether they were accepted; read for trees only
    accepted,
    owners,
    tokens,
    confidences,
    keys,
    total_len,
    seen,
    right,
    vocab,
    num_hashed,
    MAX_NUM_LOGITS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    CONFIDENCES: tl.constexpr,
    TREES: tl.constexpr,
):
    """Count the candidates before a request's ``j``-th sampled token, and claim the rows of its ``j``-th logits.

    Rows are read here and written by the next kernel. The claim of highest priority will write.

    Priorities are unique, and ordered as `update_rows` writes: by `write_turn`, shorter contexts before longer ones.
    """
    request, j = tl.program_id(0), tl.program_id(1)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    table = tl.load(table_of_request + req_idx).to(tl.int64)
    count = tl.load(num_sampled + request)
    if j < count:
        count_candidates(
            all_token_ids,
            token_ids_stride,
            req_idx,
            tl.load(total_len + req_idx) - count + j,
            table,
            tokens,
            confidences,
            keys,
            seen,
            right,
            vocab,
            num_hashed,
            K,
            K_PADDED,
            ORDER,
            ORDER_PADDED,
            CONFIDENCES,
        )
    logit_idx = tl.load(cu_num_logits + request) + j
    if logit_idx < tl.load(cu_num_logits + request + 1):
        turn = write_turn(request, j, is_accepted(j, count, accepted, logit_idx, TREES), MAX_NUM_LOGITS)
        context, position = row_context(
            all_token_ids,
            token_ids_stride,
            req_idx,
            input_ids,
            positions,
            parents,
            logit_idx,
            j,
            ORDER,
            ORDER_PADDED,
            TREES,
        )
        for i in tl.static_range(ORDER):
            key = context_keys(context, i + 1)
            own, _ = context_rows(key, context, table, vocab, num_hashed, i + 1)
            priority = tl.zeros_like(own).to(tl.int32) + turn * ORDER + i
            tl.atomic_max(owners + own, priority, mask=position >= i + tl.zeros_like(own))


@jit
def write_and_refresh_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    num_sampled,
    table_of_request,
    cu_num_logits,
    input_ids,
    positions,
    parents,  # of positions, and whether they were accepted; read for trees only
    accepted,
    owners,
    tokens,
    confidences,
    keys,
    ids,
    probs,
    edges,
    seen,
    right,
    rate,
    num_requests,
    num_rates,
    vocab,
    num_hashed,
    EDGES: tl.constexpr,
    EDGES_PADDED: tl.constexpr,
    MAX_NUM_LOGITS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TREES: tl.constexpr,
):
    """Write the model's top-k tokens at each verified position to the rows that it owns, and release them.

    The programs after those of the positions compute the acceptance rates.
    """
    program = tl.program_id(0)
    if program >= num_requests * MAX_NUM_LOGITS:
        refresh_rates(seen, right, rate, program - num_requests * MAX_NUM_LOGITS, num_rates, LIMIT, BLOCK)
        return
    request, j = program // MAX_NUM_LOGITS, program % MAX_NUM_LOGITS
    logit_idx = tl.load(cu_num_logits + request) + j
    if logit_idx < tl.load(cu_num_logits + request + 1):
        req_idx = tl.load(idx_mapping + request).to(tl.int64)
        table = tl.load(table_of_request + req_idx).to(tl.int64)
        was_accepted = is_accepted(j, tl.load(num_sampled + request), accepted, logit_idx, TREES)
        turn = write_turn(request, j, was_accepted, MAX_NUM_LOGITS)
        context, position = row_context(
            all_token_ids,
            token_ids_stride,
            req_idx,
            input_ids,
            positions,
            parents,
            logit_idx,
            j,
            ORDER,
            ORDER_PADDED,
            TREES,
        )
        rank, edge = tl.arange(0, K_PADDED), tl.arange(0, EDGES_PADDED)
        candidate = tl.load(ids + logit_idx * K + rank, mask=rank < K, other=NONE).to(tl.int32)
        prob = tl.load(probs + logit_idx * K + rank, mask=rank < K, other=0.0)
        limit = tl.load(edges + edge, mask=edge < EDGES, other=-1.0)
        # The number of edges that are not exceeded is the bin.
        confidence = tl.sum((prob[:, None] <= limit[None, :]).to(tl.int32), axis=1)
        for i in tl.static_range(ORDER):
            key = context_keys(context, i + 1)
            own, at = context_rows(key, context, table, vocab, num_hashed, i + 1)
            mine = (position >= i + tl.zeros_like(own)) & (tl.load(owners + own) == turn * ORDER + i)
            to = own[:, None] * K + rank[None, :]
            written = mine[:, None] & (rank < K)[None, :]
            tl.store(tokens + to, candidate[None, :], mask=written)
            tl.store(confidences + to, confidence[None, :].to(tl.uint8), mask=written)
            if i > 0:
                tl.store(keys + at, key, mask=mine)
            tl.debug_barrier()  # all threads have read the owner
            # Priorities are unique, so a position that lost the row loses it after the release too.
            tl.store(owners + own, tl.full([1], NONE, tl.int32), mask=mine)
