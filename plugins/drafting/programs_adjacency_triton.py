"""Triton kernels of `adjacency_triton`.

Contexts are tensors [n, ORDER_PADDED]: column d is the token at distance d from its end. A *row* of
the adjacency table is addressed by its index among the rows of all tables, which follow one another.
"""

from typing import Any, cast

import triton
import triton.language as tl

jit = cast(Any, triton.jit)

NONE: tl.constexpr = tl.constexpr(-1)
OUTSIDE: tl.constexpr = tl.constexpr(1 << 62)  # row of a context that is longer than the text


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
def find_rows(context, available, table, keys, vocab, num_hashed, ORDER: tl.constexpr):
    """Return the row of the longest known context of each, and that context's length, [n] each; see `find_row`.

    Args:
        context: [n, ORDER_PADDED] contexts.
        available: [n] number of tokens in each text, which may be fewer than the order.
        table: Index of the table.
        keys: Hashes of the contexts that own the hashed rows.
        vocab: Size of the vocabulary.
        num_hashed: Number of hashed rows of a table.
        ORDER: Longest context with its own rows.
    """
    key = context_keys(context, 1)
    row, _ = context_rows(key, context, table, vocab, num_hashed, 1)
    length = tl.full([context.shape[0]], 1, tl.int32)
    for i in tl.static_range(ORDER - 1):  # a longer context replaces a shorter one
        key = context_keys(context, i + 2)
        own, at = context_rows(key, context, table, vocab, num_hashed, i + 2)
        known = (available >= i + 2) & (tl.load(keys + at) == key)
        row = tl.where(known, own, row)
        length = tl.where(known, i + 2, length)
    return row, length


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
    row, length = find_rows(context, position, table, keys, vocab, num_hashed, ORDER)
    rank = tl.arange(0, K_PADDED)[None, :]
    candidate = tl.load(tokens + row[:, None] * K + rank, mask=rank < K, other=NONE)
    confidence = tl.load(confidences + row[:, None] * K + rank, mask=rank < K, other=0).to(tl.int32)
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
def write_turn(request, j, count, MAX_NUM_LOGITS: tl.constexpr):
    """Return the turn of a request's ``j``-th position among all of the step, in the order of `update_rows`.

    Requests follow one another; rejected positions come before accepted ones, the first rejected and the deepest
    accepted one last.
    """
    accepted = j < tl.maximum(count, 1)
    return request * 2 * MAX_NUM_LOGITS + tl.where(accepted, MAX_NUM_LOGITS + j, MAX_NUM_LOGITS - 1 - j)


@jit
def row_context(
    all_token_ids,
    token_ids_stride,
    req_idx,
    input_ids,
    logit_idx,
    j,
    position,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
):
    """Return the context that ends at a request's ``j``-th verified token, [1, ORDER_PADDED].

    Its tokens are the request's verified ones, and before them those of the text.
    """
    d = tl.arange(0, ORDER_PADDED)
    of_step = tl.load(input_ids + logit_idx - d, mask=d <= j, other=0)
    before = tl.load(
        all_token_ids + req_idx * token_ids_stride + position - d, mask=(d > j) & (d < ORDER) & (d <= position), other=0
    )
    return tl.where(d <= j, of_step, before)[None, :]


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
        turn = write_turn(request, j, count, MAX_NUM_LOGITS)
        position = tl.load(positions + logit_idx)
        context = row_context(
            all_token_ids, token_ids_stride, req_idx, input_ids, logit_idx, j, position, ORDER, ORDER_PADDED
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
        turn = write_turn(request, j, tl.load(num_sampled + request), MAX_NUM_LOGITS)
        position = tl.load(positions + logit_idx)
        context = row_context(
            all_token_ids, token_ids_stride, req_idx, input_ids, logit_idx, j, position, ORDER, ORDER_PADDED
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
            # Priorities are unique, so a position that lost the row loses it after the release too.
            tl.store(owners + own, tl.full([1], NONE, tl.int32), mask=mine)


@jit
def text_rows_kernel(
    text,
    size,
    table,
    rows,
    row_keys,
    vocab,
    num_hashed,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the rows of all contexts of a text that have a follower, and the contexts' keys, [size - 1, ORDER]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size - 1
    d = tl.arange(0, ORDER_PADDED)
    known = (d[None, :] < ORDER) & (d[None, :] <= i[:, None]) & inside[:, None]
    context = tl.load(text + i[:, None] - d[None, :], mask=known, other=0)
    for length in tl.static_range(ORDER):
        key = context_keys(context, length + 1)
        own, _ = context_rows(key, context, table.to(tl.int64), vocab, num_hashed, length + 1)
        at = i.to(tl.int64) * ORDER + length
        tl.store(rows + at, tl.where(i >= length, own, OUTSIDE), mask=inside)
        tl.store(row_keys + at, key, mask=inside)


@jit
def prime_rows_kernel(
    text,
    size,  # number of entries
    sorted_rows,
    entries,
    row_keys,
    tokens,
    confidences,
    keys,
    vocab,
    num_hashed,
    FROM_TEXT: tl.constexpr,
    MOST: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Insert the followers of one row's contexts at the front of the row, the latest first; see `prime_from_text`.

    The entries (position and length of a context) are sorted by row and then by position. The program of a row's last
    entry does the work, the others none. Only the last ``MOST`` entries of a row are read.
    """
    last = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + last)
    after = tl.load(sorted_rows + last + 1, mask=last + 1 < size, other=NONE)
    if (row != OUTSIDE) & (row != after):
        rank = tl.arange(0, K_PADDED)
        in_table = row % (vocab + num_hashed)
        hashed = in_table >= vocab
        key_at = keys + row // (vocab + num_hashed) * num_hashed + in_table - vocab
        key = tl.load(row_keys + tl.load(entries + last))
        kept = tl.full([K_PADDED], NONE, tl.int32)
        confidence = tl.full([K_PADDED], FROM_TEXT, tl.int32)
        count, at = 0, last
        first = tl.maximum(last - MOST + 1, 0)
        same = True
        while same & (at >= first) & (count < K):
            entry = tl.load(entries + at)
            follower = tl.load(text + entry // ORDER + 1)
            # An earlier context of the same row: its candidates were dropped when this one claimed the row.
            same = (tl.load(sorted_rows + at) == row) & (tl.load(row_keys + entry) == key)
            new = same & (tl.sum((kept == follower).to(tl.int32), axis=0) == 0)
            kept = tl.where(new & (rank == count), follower, kept)
            count += new.to(tl.int32)
            at -= 1
        # Where the walk ended before another context's entry, older candidates of the row follow.
        ended_in_row = (~same) & (tl.load(sorted_rows + at + 1) == row)
        owned = (~hashed) | (tl.load(key_at, mask=hashed, other=0) == key)
        if owned & (~ended_in_row):
            for i in range(K):
                old = tl.load(tokens + row * K + i)
                how = tl.load(confidences + row * K + i).to(tl.int32)
                new = (old != NONE) & (count < K) & (tl.sum((kept == old).to(tl.int32), axis=0) == 0)
                kept = tl.where(new & (rank == count), old, kept)
                confidence = tl.where(new & (rank == count), how, confidence)
                count += new.to(tl.int32)
        tl.store(tokens + row * K + rank, kept, mask=rank < K)
        tl.store(confidences + row * K + rank, confidence.to(tl.uint8), mask=rank < K)
        tl.store(key_at, key, mask=hashed)


@jit
def propose_chain_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    table_of_request,
    tokens,
    confidences,
    keys,
    rate,
    vocab,
    num_hashed,
    drafts,
    scores,
    NUM_SPEC_TOKENS: tl.constexpr,
    NUM_SPEC_TOKENS_PADDED: tl.constexpr,
    BEAMS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    CONFIDENCES: tl.constexpr,
):
    """Propose the chain of the largest expected number of accepted tokens for one request, by a beam search.

    A beam's score is the probability that all of its tokens are accepted; the sum of the scores along it is the
    expected number of accepted tokens. Where no row has a candidate, the chain is filled with the last token.
    """
    request = tl.program_id(0)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    table = tl.load(table_of_request + req_idx).to(tl.int64)
    length = tl.load(total_len + req_idx)
    beam, d = tl.arange(0, BEAMS), tl.arange(0, ORDER_PADDED)
    rank, step = tl.arange(0, K_PADDED), tl.arange(0, NUM_SPEC_TOKENS_PADDED)
    flat = tl.arange(0, BEAMS * K_PADDED)
    text = all_token_ids + req_idx * token_ids_stride + length - 1
    tail = tl.load(text - d, mask=(d < ORDER) & (d < length), other=0)
    context = tl.zeros([BEAMS, ORDER_PADDED], tl.int32) + tail[None, :]
    score = tl.where(beam == 0, 1.0, 0.0)
    expected = tl.zeros([BEAMS], tl.float32)
    path = tl.zeros([BEAMS, NUM_SPEC_TOKENS_PADDED], tl.int32) + tl.load(text)
    path_score = tl.zeros([BEAMS, NUM_SPEC_TOKENS_PADDED], tl.float32)
    best = 0.0
    best_path = tl.zeros([NUM_SPEC_TOKENS_PADDED], tl.int32) + tl.load(text)
    best_score = tl.zeros([NUM_SPEC_TOKENS_PADDED], tl.float32)
    for depth in range(NUM_SPEC_TOKENS):
        row, known = find_rows(context, length + depth, table, keys, vocab, num_hashed, ORDER)
        at = row[:, None] * K + rank[None, :]
        candidate = tl.load(tokens + at, mask=(rank < K)[None, :], other=NONE)
        confidence = tl.load(confidences + at, mask=(rank < K)[None, :], other=0).to(tl.int32)
        cell = ((table * (ORDER + 1) + known[:, None]) * K + rank[None, :]) * CONFIDENCES + confidence
        open_ = (candidate != NONE) & (score > 0.0)[:, None]
        after = score[:, None] * tl.load(rate + cell, mask=open_, other=0.0)
        left = tl.reshape(tl.where(open_, after, -1.0), [BEAMS * K_PADDED])
        named = tl.reshape(candidate, [BEAMS * K_PADDED])
        new_score = tl.zeros([BEAMS], tl.float32)
        parent, token = tl.zeros([BEAMS], tl.int32), tl.zeros([BEAMS], tl.int32)
        for i in tl.static_range(BEAMS):
            top = tl.argmax(left, axis=0)
            new_score = tl.where(beam == i, tl.maximum(tl.max(left, axis=0), 0.0), new_score)
            parent = tl.where(beam == i, top // K_PADDED, parent)
            token = tl.where(beam == i, tl.sum(tl.where(flat == top, named, 0), axis=0), token)
            left = tl.where(flat == top, -1.0, left)
        # Each beam continues its parent.
        of_parent = parent[:, None] == beam[None, :]
        score = new_score
        expected = tl.sum(tl.where(of_parent, expected[None, :], 0.0), axis=1) + score
        path = tl.sum(tl.where(of_parent[:, :, None], path[None, :, :], 0), axis=1)
        path = tl.where((step == depth)[None, :], token[:, None], path)
        path_score = tl.sum(tl.where(of_parent[:, :, None], path_score[None, :, :], 0.0), axis=1)
        path_score = tl.where((step == depth)[None, :], score[:, None], path_score)
        context = tl.sum(tl.where(of_parent[:, :, None], context[None, :, :], 0), axis=1)
        is_next = d[None, :, None] + 1 == d[None, None, :]
        context = tl.sum(tl.where(is_next, context[:, :, None], 0), axis=1)
        context = tl.where((d == 0)[None, :], token[:, None], context)
        # The expected number grows along a beam, so the best of all depths is seen even if a beam ends.
        most, winner = tl.max(expected, axis=0), tl.argmax(expected, axis=0)
        is_winner = (beam == winner)[:, None]
        best_path = tl.where(most > best, tl.sum(tl.where(is_winner, path, 0), axis=0), best_path)
        best_score = tl.where(most > best, tl.sum(tl.where(is_winner, path_score, 0.0), axis=0), best_score)
        best = tl.maximum(most, best)
    to = request * NUM_SPEC_TOKENS + step
    tl.store(drafts + to, best_path.to(tl.int64), mask=step < NUM_SPEC_TOKENS)
    tl.store(scores + to, best_score, mask=step < NUM_SPEC_TOKENS)
