"""Triton kernels that make drafts from the adjacency tables of `adjacency_triton`: chains, and trees.

Chains and trees are found by a beam search. The score of a token is the probability that it and all tokens before it
are accepted. So the expected number of accepted tokens is the sum of the scores, and the best tree of n nodes consists
of the n tokens of the highest scores: none has a higher score than its parent.
"""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_adjacency_triton import NONE, find_candidates

jit = cast(Any, triton.jit)

CLOSED: tl.constexpr = tl.constexpr(-1.0)  # score of a candidate that does not exist


@jit
def score_candidates(
    context,
    available,
    score,
    table,
    tokens,
    confidences,
    keys,
    rate,
    vocab,
    num_hashed,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    CONFIDENCES: tl.constexpr,
):
    """Return the candidates after the contexts of beams and their scores, [BEAMS, K_PADDED] each.

    ``score`` [BEAMS] is that of each beam; one with score 0 has no candidates.
    """
    rank = tl.arange(0, K_PADDED)
    candidate, confidence, known = find_candidates(
        context, available, table, tokens, confidences, keys, vocab, num_hashed, K, K_PADDED, ORDER
    )
    cell = ((table * (ORDER + 1) + known[:, None]) * K + rank[None, :]) * CONFIDENCES + confidence
    exists = (candidate != NONE) & (score > 0.0)[:, None]
    return candidate, tl.where(exists, score[:, None] * tl.load(rate + cell, mask=exists, other=0.0), CLOSED)


@jit
def extend_contexts(context, of_parent, token):
    """Return the contexts of beams that continue their parents by one token each.

    Args:
        context: [BEAMS, ORDER_PADDED] contexts of the beams before.
        of_parent: [BEAMS, BEAMS] whether a beam (row) continues one of those (column).
        token: [BEAMS] tokens.
    """
    d = tl.arange(0, context.shape[1])
    context = tl.sum(tl.where(of_parent[:, :, None], context[None, :, :], 0), axis=1)
    is_next = d[None, :, None] + 1 == d[None, None, :]
    context = tl.sum(tl.where(is_next, context[:, :, None], 0), axis=1)
    return tl.where((d == 0)[None, :], token[:, None], context)


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
    request = tl.program_id(0).to(tl.int64)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    table = tl.load(table_of_request + req_idx).to(tl.int64)
    length = tl.load(total_len + req_idx)
    beam, d = tl.arange(0, BEAMS), tl.arange(0, ORDER_PADDED)
    step = tl.arange(0, NUM_SPEC_TOKENS_PADDED)
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
        candidate, after = score_candidates(
            context,
            length + depth,
            score,
            table,
            tokens,
            confidences,
            keys,
            rate,
            vocab,
            num_hashed,
            K,
            K_PADDED,
            ORDER,
            CONFIDENCES,
        )
        left = tl.reshape(after, [BEAMS * K_PADDED])
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
        context = extend_contexts(context, of_parent, token)
        # The expected number grows along a beam, so the best of all depths is seen even if a beam ends.
        most, winner = tl.max(expected, axis=0), tl.argmax(expected, axis=0)
        is_winner = (beam == winner)[:, None]
        best_path = tl.where(most > best, tl.sum(tl.where(is_winner, path, 0), axis=0), best_path)
        best_score = tl.where(most > best, tl.sum(tl.where(is_winner, path_score, 0.0), axis=0), best_score)
        best = tl.maximum(most, best)
    to = request * NUM_SPEC_TOKENS + step
    tl.store(drafts + to, best_path.to(tl.int64), mask=step < NUM_SPEC_TOKENS)
    tl.store(scores + to, best_score, mask=step < NUM_SPEC_TOKENS)


@jit
def expand_beams_kernel(
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
    chain_only,  # [max_num_reqs] bool: whether the drafts of a request must be a chain
    chains,  # [requests, CHAIN_LENGTH] int64 chain that the search follows in its first beam
    chain_scores,  # [requests, CHAIN_LENGTH] float32, 0 after its end
    pool_tokens,  # [requests, DEPTH, BEAMS, K_PADDED]
    pool_scores,
    pool_parents,  # index of each candidate's parent among those of its request; NONE for the root
    DEPTH: tl.constexpr,
    BEAMS: tl.constexpr,
    HAS_CHAIN: tl.constexpr,
    CHAIN_LENGTH: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    CONFIDENCES: tl.constexpr,
):
    """Write the candidates of one request's draft tree: at each depth, all continuations of the best nodes above."""
    request = tl.program_id(0)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    table = tl.load(table_of_request + req_idx).to(tl.int64)
    length = tl.load(total_len + req_idx)
    beam, d, rank = tl.arange(0, BEAMS), tl.arange(0, ORDER_PADDED), tl.arange(0, K_PADDED)
    flat = tl.arange(0, BEAMS * K_PADDED)
    single = tl.load(chain_only + req_idx).to(tl.int32)
    text = all_token_ids + req_idx * token_ids_stride + length - 1
    tail = tl.load(text - d, mask=(d < ORDER) & (d < length), other=0)
    context = tl.zeros([BEAMS, ORDER_PADDED], tl.int32) + tail[None, :]
    score = tl.where(beam == 0, 1.0, 0.0)
    node = tl.zeros([BEAMS], tl.int32) + NONE
    # An element of the first beam is addressed by `first`; the last slot takes a token that the row does not have.
    first = (beam == 0)[:, None] & (rank >= 0)[None, :]
    spare = first & (rank == K_PADDED - 1)[None, :]
    for depth in range(DEPTH):
        candidate, after = score_candidates(
            context,
            length + depth,
            score,
            table,
            tokens,
            confidences,
            keys,
            rate,
            vocab,
            num_hashed,
            K,
            K_PADDED,
            ORDER,
            CONFIDENCES,
        )
        followed = first & (candidate < NONE)  # where the chain goes on, if it does
        if HAS_CHAIN:
            chained = tl.load(chains + request * CHAIN_LENGTH + depth).to(tl.int32)
            chain_score = tl.load(chain_scores + request * CHAIN_LENGTH + depth) + tl.zeros_like(after)
            listed = first & (after >= 0.0) & (candidate == chained)
            is_listed = tl.max(tl.max(listed.to(tl.int32), axis=1), axis=0) + tl.zeros_like(candidate)
            followed = (chain_score > 0.0) & (listed | (spare & (is_listed == 0)))
            candidate = tl.where(followed, chained, candidate)
            after = tl.where(followed, tl.maximum(after, chain_score), after)
        left = tl.reshape(after, [BEAMS * K_PADDED])
        named = tl.reshape(candidate, [BEAMS * K_PADDED])
        forced = tl.reshape(followed.to(tl.int32), [BEAMS * K_PADDED])
        is_forced = tl.max(forced, axis=0)
        new_score = tl.zeros([BEAMS], tl.float32)
        parent, token, new_node = tl.zeros([BEAMS], tl.int32), tl.zeros([BEAMS], tl.int32), node
        for i in tl.static_range(BEAMS):
            top = tl.argmax(left, axis=0)
            if i == 0:
                top = tl.where(is_forced > 0, tl.argmax(forced, axis=0), top)
            highest = tl.maximum(tl.sum(tl.where(flat == top, left, 0.0), axis=0), 0.0)
            new_score = tl.where(beam == i, highest, new_score)
            parent = tl.where(beam == i, top // K_PADDED, parent)
            token = tl.where(beam == i, tl.sum(tl.where(flat == top, named, 0), axis=0), token)
            new_node = tl.where(beam == i, depth * BEAMS * K_PADDED + top, new_node)
            left = tl.where(flat == top, CLOSED, left)
        # Of a chain, the first beam's token is the only candidate.
        of_chain = tl.sum(tl.where(beam == 0, new_node, 0), axis=0) - depth * BEAMS * K_PADDED
        kept = (single + 0 * flat == 0) | (flat == of_chain)
        new_score = tl.where((beam == 0) | (single + 0 * beam == 0), new_score, 0.0)
        to = (request * DEPTH + depth) * BEAMS * K_PADDED + flat
        tl.store(pool_tokens + to, named)
        tl.store(pool_scores + to, tl.where(kept, tl.reshape(after, [BEAMS * K_PADDED]), CLOSED))
        tl.store(pool_parents + to, tl.reshape(node[:, None] + tl.zeros_like(candidate), [BEAMS * K_PADDED]))
        score, node = new_score, new_node
        of_parent = parent[:, None] == beam[None, :]
        context = extend_contexts(context, of_parent, token)


@jit
def select_nodes_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    pool_tokens,
    pool_scores,
    pool_parents,
    drafts,  # [requests, NUM_SPEC_TOKENS] int64; output, like the next two
    parents,
    scores,
    size,  # number of candidates of a request
    NUM_SPEC_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the candidates of the highest scores as nodes of one request's draft tree, the best first.

    A node's index is the number of candidates that come before it. Of equal scores, the candidate of the lower depth
    comes first, so that parents come before their children. Where there are too few candidates, the last token of the
    text follows as a chain.
    """
    request = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pool_scores += request * size
    score = tl.load(pool_scores + i, mask=i < size, other=CLOSED)
    above = tl.load(pool_parents + request * size + i, mask=i < size, other=NONE)
    above_score = tl.load(pool_scores + above, mask=above >= 0, other=2.0)
    index, above_index = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for begin in range(0, size, COLUMNS):
        other = begin + j
        other_score = tl.load(pool_scores + other, mask=other < size, other=CLOSED - 1.0)[None, :]
        first = (other_score > score[:, None]) | ((other_score == score[:, None]) & (other[None, :] < i[:, None]))
        index += tl.sum(first.to(tl.int32), axis=1)
        first = (other_score > above_score[:, None]) | (
            (other_score == above_score[:, None]) & (other[None, :] < above[:, None])
        )
        above_index += tl.sum(first.to(tl.int32), axis=1)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    last = tl.load(all_token_ids + req_idx * token_ids_stride + tl.load(total_len + req_idx) - 1)
    token = tl.load(pool_tokens + request * size + i, mask=i < size, other=0)
    exists = score >= 0.0
    parent = tl.where(exists, tl.where(above >= 0, above_index, NONE), index - 1)
    to = request * NUM_SPEC_TOKENS + index
    chosen = (i < size) & (index < NUM_SPEC_TOKENS)
    tl.store(drafts + to, tl.where(exists, token, last).to(tl.int64), mask=chosen)
    tl.store(parents + to, parent, mask=chosen)
    tl.store(scores + to, tl.maximum(score, 0.0), mask=chosen)
