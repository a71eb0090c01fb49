"""Fusion of retrieved continuations with the rows of an adjacency table on a device; the counterpart of `tries`.

The host fuses whole trees. A device drafter proposes a chain, so one program walks down the fused tree: at each depth
it estimates the acceptance rates of the token that most continuations of each source have, and of the adjacency
table's best candidate, and takes the token of the highest one. Continuations that have another token there are dropped.
"""

from typing import Any, cast

import triton
import triton.language as tl

from . import acceptance_counts as counts
from . import programs_drafts_triton
from .programs_adjacency_triton import NONE, find_candidates

jit = cast(Any, triton.jit)

FIRST: tl.constexpr = tl.constexpr(counts.FIRST)
LISTED: tl.constexpr = tl.constexpr(counts.LISTED)
ABSENT: tl.constexpr = tl.constexpr(counts.ABSENT)
UNKNOWN: tl.constexpr = tl.constexpr(counts.UNKNOWN)
ANY: tl.constexpr = tl.constexpr(counts.ANY)
LENGTH_BINS: tl.constexpr = tl.constexpr(counts.SHAPE[0])
SHARE_BINS: tl.constexpr = tl.constexpr(counts.SHAPE[1])
FEEDBACK: tl.constexpr = tl.constexpr(counts.SHAPE[2])
PRIOR: tl.constexpr = tl.constexpr(float(counts.FEEDBACK_PRIOR))
MAX_COUNT: tl.constexpr = tl.constexpr(counts.MAX_COUNT)
NO_FOLLOWER: tl.constexpr = tl.constexpr(-1)


@jit
def cell_of(source, length_bin, share_bin, feedback):
    """Return the index of a cell of the acceptance counts; see `acceptance_counts.make_acceptance_counts`."""
    return ((source * LENGTH_BINS + length_bin) * SHARE_BINS + share_bin) * FEEDBACK + feedback


@jit
def acceptance_rates(cell, num_verified, num_accepted, mask):
    """Return the acceptance rates of cells; see `tries`."""
    of_any = cell // FEEDBACK * FEEDBACK + ANY
    prior = tl.load(num_accepted + of_any, mask=mask, other=0.0) / tl.load(num_verified + of_any, mask=mask, other=1.0)
    accepted = tl.load(num_accepted + cell, mask=mask, other=0.0)
    return (accepted + PRIOR * prior) / (tl.load(num_verified + cell, mask=mask, other=0.0) + PRIOR)


@jit
def fuse_chains_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    followers,  # [SOURCES, max_num_reqs, MOST, NUM_SPEC_TOKENS] continuations of each source's longest match
    lengths,  # [SOURCES, max_num_reqs] number of matching tokens
    table_of_request,  # the adjacency tables, like the next six
    row_tokens,
    row_confidences,
    row_keys,
    row_rates,
    vocab,
    num_hashed,
    num_verified,  # counts of `make_acceptance_counts`, like the next
    num_accepted,
    length_edges,  # edges of the bins of the counts, padded, like the next two
    share_edges,
    conditional_edges,
    predicted,  # [max_num_reqs, SOURCES + 1, NUM_SPEC_TOKENS] next token of each source, and of the table
    cells,  # where these tokens are counted
    chains,  # [max_num_reqs, NUM_SPEC_TOKENS]
    drafts,  # [requests, NUM_SPEC_TOKENS] int64; output
    scores,  # [requests, NUM_SPEC_TOKENS] float32 probabilities that the drafts are accepted; output
    max_num_reqs,
    prune,  # least acceptance probability of a retrieved token
    SOURCES: tl.constexpr,
    SOURCES_PADDED: tl.constexpr,
    MOST: tl.constexpr,
    MOST_PADDED: tl.constexpr,
    NUM_SPEC_TOKENS: tl.constexpr,
    NUM_SPEC_TOKENS_PADDED: tl.constexpr,
    BEAMS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BASE_DRAFTS: tl.constexpr,
    BASE_FEEDBACK: tl.constexpr,
    FUSE: tl.constexpr,
    PREDICTIONS_PADDED: tl.constexpr,
    LENGTH_EDGES_PADDED: tl.constexpr,
    SHARE_EDGES_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    CONFIDENCES: tl.constexpr,
):
    """Write the chain of one request, and what each source predicts along it.

    Where nothing was retrieved and there is a base drafter, its chain is written with ``BASE_DRAFTS``, and without it
    none.
    """
    request = tl.program_id(0).to(tl.int64)
    req_idx = tl.load(idx_mapping + request).to(tl.int64)
    total = tl.load(total_len + req_idx)
    source, row = tl.arange(0, SOURCES_PADDED), tl.arange(0, MOST_PADDED)
    rank, d = tl.arange(0, K_PADDED), tl.arange(0, ORDER_PADDED)
    length_edge = tl.load(length_edges + tl.arange(0, LENGTH_EDGES_PADDED))
    share_edge = tl.load(share_edges + tl.arange(0, SHARE_EDGES_PADDED))
    conditional_edge = tl.load(conditional_edges + tl.arange(0, LENGTH_EDGES_PADDED))
    matched = tl.load(lengths + source * max_num_reqs + request, mask=source < SOURCES, other=0)
    at = followers + ((source[:, None] * max_num_reqs + request) * MOST + row[None, :]) * NUM_SPEC_TOKENS
    left = (source < SOURCES)[:, None] & (row < MOST)[None, :] & (matched > 0)[:, None]
    left = left & (tl.load(at, mask=left, other=NO_FOLLOWER) >= 0)  # the other rows are empty
    found = tl.max(tl.max(left.to(tl.int32), axis=1), axis=0)
    if (found == 0) & (HAS_BASE == 1):
        i, predictions = tl.arange(0, PREDICTIONS_PADDED), (SOURCES + 1) * NUM_SPEC_TOKENS
        tl.store(predicted + req_idx * predictions + i, i * 0 + NONE, mask=i < predictions)
        if BASE_DRAFTS:
            programs_drafts_triton.propose_chain_kernel(
                all_token_ids,
                token_ids_stride,
                idx_mapping,
                total_len,
                table_of_request,
                row_tokens,
                row_confidences,
                row_keys,
                row_rates,
                vocab,
                num_hashed,
                drafts,
                scores,
                NUM_SPEC_TOKENS,
                NUM_SPEC_TOKENS_PADDED,
                BEAMS,
                K,
                K_PADDED,
                ORDER,
                ORDER_PADDED,
                CONFIDENCES,
            )
        else:
            step = tl.arange(0, NUM_SPEC_TOKENS_PADDED)
            no_score = tl.zeros([NUM_SPEC_TOKENS_PADDED], tl.float32)
            tl.store(scores + request * NUM_SPEC_TOKENS + step, no_score, mask=step < NUM_SPEC_TOKENS)
        return
    text = all_token_ids + req_idx * token_ids_stride + total - 1
    filler = tl.load(text)
    context = tl.load(text - d, mask=(d < ORDER) & (d < total), other=0)[None, :]
    table = tl.load(table_of_request + req_idx).to(tl.int64)
    score = 1.0
    for depth in range(NUM_SPEC_TOKENS):
        # The token that most continuations of each source have; of equals, that of the newest one.
        follower = tl.load(at + depth, mask=left, other=NO_FOLLOWER)
        before = tl.sum(left.to(tl.int32), axis=1)
        left = left & (follower >= 0)
        equal = left[:, :, None] & left[:, None, :] & (follower[:, :, None] == follower[:, None, :])
        votes = tl.sum(equal.to(tl.int32), axis=2)
        most = tl.max(votes, axis=1)
        token = tl.sum(tl.where(row[None, :] == tl.argmax(votes, axis=1)[:, None], follower, 0), axis=1)
        has = most > 0
        share = most.to(tl.float32) / tl.maximum(before, 1).to(tl.float32)
        # The adjacency table's candidates at the same place.
        base_token, base_rate = filler, tl.sum(tl.full([1], -1.0, tl.float32), axis=0)
        feedback = tl.zeros_like(most) + UNKNOWN
        if HAS_BASE:
            candidate, confidence, known = find_candidates(
                context,
                total + depth,
                table,
                row_tokens,
                row_confidences,
                row_keys,
                vocab,
                num_hashed,
                K,
                K_PADDED,
                ORDER,
            )
            cell = ((table * (ORDER + 1) + known[:, None]) * K + rank[None, :]) * CONFIDENCES + confidence
            rates = tl.load(row_rates + cell, mask=candidate != NONE, other=-1.0)
            base_rate = tl.max(tl.max(rates, axis=1), axis=0)
            best = tl.argmax(rates, axis=1)
            base_token = tl.sum(tl.sum(tl.where(rank[None, :] == best[:, None], candidate, 0), axis=1), axis=0)
            if BASE_FEEDBACK:
                listed = tl.max((candidate == token[:, None]).to(tl.int32), axis=1) > 0
                feedback = tl.where(token == base_token, FIRST, tl.where(listed, LISTED, ABSENT))
                feedback = tl.where(base_rate >= 0.0, feedback, UNKNOWN)
        # Acceptance rates of the retrieved tokens.
        length_bin = tl.sum(((matched + depth)[:, None] >= length_edge[None, :]).to(tl.int32), axis=1)
        share_bin = tl.sum((share[:, None] < share_edge[None, :]).to(tl.int32), axis=1)
        cell = cell_of(source, length_bin, share_bin, feedback)
        rate = tl.where(has, acceptance_rates(cell, num_verified, num_accepted, has), 0.0)
        to = (req_idx * (SOURCES + 1) + source) * NUM_SPEC_TOKENS + depth
        tl.store(predicted + to, tl.where(has, token, NONE), mask=source < SOURCES)
        tl.store(cells + to, cell, mask=source < SOURCES)
        # The base drafter does not know what was retrieved; its rate depends on what that leaves.
        same = has[:, None] & has[None, :] & (token[:, None] == token[None, :]) & (source[:, None] > source[None, :])
        repeated = tl.max(same.to(tl.int32), axis=1) > 0
        taken = tl.sum(tl.where(repeated, 0.0, rate), axis=0)
        retrieved = tl.max((has & (token == base_token)).to(tl.int32), axis=0) > 0
        counts_base = (base_rate >= 0.0) & (~retrieved)
        taken_bin = tl.sum((taken < share_edge).to(tl.int32), axis=0)
        conditional_bin = tl.sum((base_rate >= conditional_edge).to(tl.int32), axis=0)
        base_cell = cell_of(SOURCES, conditional_bin, taken_bin, UNKNOWN)
        base_rate = acceptance_rates(base_cell, num_verified, num_accepted, counts_base)
        to = (req_idx * (SOURCES + 1) + SOURCES) * NUM_SPEC_TOKENS + depth
        tl.store(predicted + to, tl.where(counts_base & FUSE, base_token, NONE))
        tl.store(cells + to, base_cell)
        # The token of the highest rate continues the chain.
        rate = tl.where(score * rate >= prune, rate, 0.0)
        highest = tl.max(rate, axis=0)
        chosen = tl.sum(tl.where(source == tl.argmax(rate, axis=0), token, 0), axis=0)
        base_rate = tl.where(counts_base & FUSE, base_rate, 0.0)
        chosen = tl.where(base_rate > highest, base_token, chosen)
        score *= tl.maximum(highest, base_rate)
        chosen = tl.where(score > 0.0, chosen, filler)
        tl.store(chains + req_idx * NUM_SPEC_TOKENS + depth, chosen)
        tl.store(drafts + request * NUM_SPEC_TOKENS + depth, chosen.to(tl.int64))
        tl.store(scores + request * NUM_SPEC_TOKENS + depth, score)
        left = left & (follower == chosen)
        shifted = tl.sum(tl.where((d[:, None] + 1 == d[None, :])[None, :, :], context[:, :, None], 0), axis=1)
        context = tl.where((d == 0)[None, :], chosen, shifted)


@jit
def count_predictions_kernel(
    all_token_ids,
    token_ids_stride,
    idx_mapping,
    total_len,
    num_sampled,
    predicted,
    cells,
    chains,
    num_verified,
    num_accepted,
    PREDICTORS: tl.constexpr,
    PREDICTORS_PADDED: tl.constexpr,
    NUM_SPEC_TOKENS: tl.constexpr,
):
    """Count, for one request, the predictions along the accepted part of its last chain, and the right ones.

    All counts are whole numbers, so their sums do not depend on the order of the additions.
    """
    req_idx = tl.load(idx_mapping + tl.program_id(0)).to(tl.int64)
    count = tl.load(num_sampled + tl.program_id(0))
    text = all_token_ids + req_idx * token_ids_stride + tl.load(total_len + req_idx) - count
    predictor = tl.arange(0, PREDICTORS_PADDED)
    count, text = count + 0 * predictor, text + 0 * predictor  # the interpreter cannot broadcast a scalar condition
    reached = predictor < PREDICTORS
    for depth in range(NUM_SPEC_TOKENS):
        reached = reached & (depth < count)
        actual = tl.load(text + depth, mask=reached, other=NONE)
        at = (req_idx * PREDICTORS + predictor) * NUM_SPEC_TOKENS + depth
        token = tl.load(predicted + at, mask=predictor < PREDICTORS, other=NONE)
        cell = tl.load(cells + at, mask=predictor < PREDICTORS, other=0)
        counted = reached & (token != NONE)
        right = counted & (token == actual)
        one = tl.full([PREDICTORS_PADDED], 1.0, tl.float32)
        of_any = cell // FEEDBACK * FEEDBACK + ANY
        tl.atomic_add(num_verified + cell, one, mask=counted)
        tl.atomic_add(num_verified + of_any, one, mask=counted)
        tl.atomic_add(num_accepted + cell, one, mask=right)
        tl.atomic_add(num_accepted + of_any, one, mask=right)
        reached = reached & (tl.load(chains + req_idx * NUM_SPEC_TOKENS + depth) == actual)


@jit
def halve_counts_kernel(num_verified, num_accepted, size, BLOCK: tl.constexpr):
    """Halve the counts of cells that have reached their largest number."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    verified = tl.load(num_verified + at, mask=at < size, other=0.0)
    full = verified >= MAX_COUNT
    tl.store(num_verified + at, verified * 0.5, mask=full)
    tl.store(num_accepted + at, tl.load(num_accepted + at, mask=full, other=0.0) * 0.5, mask=full)
