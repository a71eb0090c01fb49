"""Loops of the sparse index in numba. The arrays are described in `retrieval.sparse_index`."""

import numpy as np

from pilotfish._internal.jit import jit

BLOCK = 16  # internal doc ids per block
SKIP = 64  # distance of the blocks whose first posting is stored in ``skips``
FEW = 64  # a term with more than 64 blocks per selected block is searched by binary search instead of a scan


@jit
def by_term(terms, starts):
    """Return the permutation that sorts entries by term (stable counting sort); ``starts`` is overwritten."""
    order = np.empty(len(terms), np.int64)
    for i in range(len(terms)):
        order[starts[terms[i]]] = i
        starts[terms[i]] += 1
    return order


@jit
def blocks_of(starts, documents, impacts):
    """Build the blocks of each term; return term_starts, blocks, tops, sizes and skips.

    ``starts`` is [terms + 1]; the postings of each term are in doc id order.
    """
    count = 0
    for t in range(len(starts) - 1):
        last = -1
        for i in range(starts[t], starts[t + 1]):
            if documents[i] // BLOCK != last:
                last = documents[i] // BLOCK
                count += 1
    term_starts = np.zeros(len(starts), np.int64)
    blocks, tops = np.empty(count, np.int32), np.zeros(count, impacts.dtype)
    sizes = np.zeros(count, np.uint8)
    skips = np.zeros(count // SKIP + 1, np.int64)
    at = 0
    for t in range(len(starts) - 1):
        last = -1
        for i in range(starts[t], starts[t + 1]):
            if documents[i] // BLOCK != last:
                last = documents[i] // BLOCK
                blocks[at] = last
                if at % SKIP == 0:
                    skips[at // SKIP] = i
                at += 1
            tops[at - 1] = max(tops[at - 1], impacts[i])
            sizes[at - 1] += 1
        term_starts[t + 1] = at
    return term_starts, blocks, tops, sizes, skips


@jit
def start_of(sizes, skips, block):
    """Return the index of the first posting of a block of a term."""
    at = skips[block // SKIP]
    for b in range(block - block % SKIP, block):
        at += sizes[b]
    return at


@jit
def block_bounds(term_starts, blocks, tops, terms, weights, first, count):
    """Compute an upper bound of the scores of the documents of each block, [count] from block ``first`` on.

    The terms are summed in the same order as in `score_blocks`, and rounding is monotonic, so no score exceeds its
    bound.
    """
    bounds = np.zeros(count, np.float32)
    for i in range(len(terms)):
        for b in range(term_starts[terms[i]], term_starts[terms[i] + 1]):
            bounds[blocks[b] - first] += weights[i] * np.float32(tops[b])
    return bounds


@jit
def score_blocks(term_starts, blocks, sizes, skips, places, impacts, terms, weights, first, count, chosen):
    """Compute the scores of all documents of the ``chosen`` blocks (ascending), [chosen * BLOCK]."""
    scores = np.zeros(len(chosen) * BLOCK, np.float32)
    slots = np.full(count, -1, np.int32)
    for c in range(len(chosen)):
        slots[chosen[c] - first] = c
    for i in range(len(terms)):
        begin, end = term_starts[terms[i]], term_starts[terms[i] + 1]
        if end - begin > FEW * len(chosen):
            for c in range(len(chosen)):
                b = begin + np.searchsorted(blocks[begin:end], chosen[c])
                if b < end and blocks[b] == chosen[c]:
                    start = start_of(sizes, skips, b)
                    for p in range(start, start + sizes[b]):
                        scores[c * BLOCK + places[p]] += weights[i] * np.float32(impacts[p])
        elif begin < end:
            start = start_of(sizes, skips, begin)
            for b in range(begin, end):
                c = slots[blocks[b] - first]
                if c >= 0:
                    for p in range(start, start + sizes[b]):
                        scores[c * BLOCK + places[p]] += weights[i] * np.float32(impacts[p])
                start += sizes[b]
    return scores


@jit
def score_all(term_starts, blocks, sizes, skips, places, impacts, terms, weights, first, count):
    """Compute the scores of all documents, [count * BLOCK] from block ``first`` on; in the order of `score_blocks`."""
    scores = np.zeros(count * BLOCK, np.float32)
    for i in range(len(terms)):
        begin, end = term_starts[terms[i]], term_starts[terms[i] + 1]
        if begin < end:
            p = start_of(sizes, skips, begin)
            for b in range(begin, end):
                base = (blocks[b] - first) * BLOCK
                for q in range(p, p + sizes[b]):
                    scores[base + places[q]] += weights[i] * np.float32(impacts[q])
                p += sizes[b]
    return scores


@jit
def search_all(
    term_starts, blocks, sizes, skips, places, impacts, terms, weights, first, count, k, min_score, allow, filtered
):
    """Score all documents, and return those with the ``k`` highest scores; see `score_all` and `top_k_documents`."""
    scores = score_all(term_starts, blocks, sizes, skips, places, impacts, terms, weights, first, count)
    return top_k_documents(scores, first * BLOCK, k, min_score, allow, filtered)


@jit
def top_k_documents(scores, first, k, min_score, allow, filtered):
    """Return the documents with the ``k`` highest scores.

    A heap holds the best so far, its worst entry at the top. Documents come in ascending order, so one that equals the
    worst entry is not better.

    Args:
        scores: [documents] scores of the documents from doc id ``first`` on.
        first: First doc id.
        k: Maximum number of documents.
        min_score: Lowest score that is returned; scores of 0 are never returned.
        allow: [bytes] uint8 bitmap of the allowed doc ids, lowest bit first; read if ``filtered``.
        filtered: Whether documents have to be allowed.

    Returns:
        Doc ids [n] int32 and scores [n] float32, n <= k, by descending score, ties by doc id.
    """
    heap_scores, heap = np.empty(k, np.float32), np.empty(k, np.int32)
    size = 0
    for i in range(len(scores)):
        score = scores[i]
        if score <= 0 or score < min_score or (size == k and score <= heap_scores[0]):
            continue
        document = first + i
        if filtered and (document >> 3 >= len(allow) or not (allow[document >> 3] >> (document & 7)) & 1):
            continue
        if size < k:  # append, and move up
            at = size
            size += 1
            while at > 0:
                parent = (at - 1) // 2
                if heap_scores[parent] < score:
                    break  # equal scores: the later document is the worse one, so it moves up
                heap_scores[at], heap[at] = heap_scores[parent], heap[parent]
                at = parent
        else:  # replace the worst, and move down
            at = 0
            while True:
                child = 2 * at + 1
                if child >= k:
                    break
                if child + 1 < k and _worse(heap_scores, heap, child + 1, child):
                    child += 1
                if heap_scores[child] >= score:
                    break  # equal scores: the later document is the worse one, so it stays above
                heap_scores[at], heap[at] = heap_scores[child], heap[child]
                at = child
        heap_scores[at], heap[at] = score, document
    order = np.argsort(heap[:size])
    order = order[np.argsort(-heap_scores[:size][order], kind="mergesort")]
    return heap[order], heap_scores[order]


@jit
def _worse(scores, documents, a, b):
    """Return whether entry ``a`` is worse than entry ``b``."""
    return scores[a] < scores[b] or (scores[a] == scores[b] and documents[a] > documents[b])
