"""Loops of the sparse index, in numba. See `retrieval.sparse_index` for what the arrays are."""

import numpy as np

from pilotfish._internal.jit import jit

BLOCK = 16  # documents, by their numbers
SKIP = 64  # blocks of all terms, whose first posting is kept
FEW = 64  # times as many entries as blocks that are wanted: then each is looked up


@jit
def by_term(terms, starts):
    """Where each entry goes when entries are sorted by term and stay in order within one; ``starts`` is used up."""
    place = np.empty(len(terms), np.int64)
    for i in range(len(terms)):
        place[starts[terms[i]]] = i
        starts[terms[i]] += 1
    return place


@jit
def blocks_of(starts, documents, impacts):
    """The blocks of each term: where terms' blocks begin, their numbers, greatest impacts and postings, and skips.

    ``starts`` [terms + 1], postings of each term by ascending document.
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
    """Where the postings of a term's block begin."""
    at = skips[block // SKIP]
    for b in range(block - block % SKIP, block):
        at += sizes[b]
    return at


@jit
def block_bounds(term_starts, blocks, tops, terms, weights, first, count):
    """The most that a document of each block can have, [count] from block ``first`` on.

    Sums run over terms in the same order as in `scores`, and rounding keeps order, so no score is above its bound.
    """
    found = np.zeros(count, np.float32)
    for i in range(len(terms)):
        for b in range(term_starts[terms[i]], term_starts[terms[i] + 1]):
            found[blocks[b] - first] += weights[i] * np.float32(tops[b])
    return found


@jit
def score_blocks(term_starts, blocks, sizes, skips, places, impacts, terms, weights, first, count, chosen):
    """Scores of all documents of ``chosen`` blocks (ascending), [chosen * BLOCK]."""
    found = np.zeros(len(chosen) * BLOCK, np.float32)
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
                        found[c * BLOCK + places[p]] += weights[i] * np.float32(impacts[p])
        elif begin < end:
            start = start_of(sizes, skips, begin)
            for b in range(begin, end):
                c = slots[blocks[b] - first]
                if c >= 0:
                    for p in range(start, start + sizes[b]):
                        found[c * BLOCK + places[p]] += weights[i] * np.float32(impacts[p])
                start += sizes[b]
    return found
