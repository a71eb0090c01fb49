"""Trees of retrieved continuations: grown, scored by what came of earlier ones, fused with a drafter's own tree.

A trie has one node for each beginning of a continuation, counted. Its score is learned on line: how often a node was
right once its parent was, by its source, by how many tokens agreed up to it, by its share among its parent's
continuations, and by what the drafter's own tree says of its token (RASD's pruning by the drafter's distribution, arXiv
2503.03434, as a rate instead of a threshold).

Compiled with numba; nodes stand behind their parents in every array.
"""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from ..contracts import ROOT

Int32, Float32 = NDArray[np.int32], NDArray[np.float32]

LENGTHS = np.array([2, 3, 4, 5, 7, 9, 13, 17, 25, 33], np.int32)  # upper ends of bins of agreeing tokens
SHARES = np.array([0.95, 0.65, 0.45, 0.25, 0.1], np.float32)  # lower ends of bins of shares
FIRST, LISTED, ABSENT, UNKNOWN = range(4)  # what the drafter's tree says: its favourite, listed, not listed, nothing
SHAPE = (len(LENGTHS) + 1, len(SHARES) + 1, 4)
FADE = 1000  # sightings after which a cell's evidence is halved


def make_acceptance_counts(sources: int) -> tuple[Float32, Float32]:
    """Counts of nodes seen and found right, each [sources, lengths, shares, opinions], with a weak prior."""
    by_length = np.array([0.3, 0.35, 0.45, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.95], np.float32)
    by_share = np.array([1.0, 0.75, 0.5, 0.35, 0.2, 0.08], np.float32)
    by_opinion = np.array([1.0, 0.8, 0.6, 0.8], np.float32)
    rate = by_length[:, None, None] * by_share[:, None] * by_opinion
    seen = np.full((sources, *SHAPE), 4.0, np.float32)
    return seen, (seen * rate).astype(np.float32)


@jit
def _bin(value: float, ends: NDArray) -> int:
    """The first bin whose upper end a number does not reach."""
    for i in range(ends.shape[0]):
        if value < ends[i]:
            return i
    return ends.shape[0]


@jit
def _share_bin(share: float) -> int:
    for i in range(SHARES.shape[0]):
        if share >= SHARES[i]:
            return i
    return SHARES.shape[0]


@jit
def _child(tokens: Int32, parents: Int32, n: int, parent: int, token: int) -> int:
    """The child of a node that holds a token, ROOT if there is none; children stand behind their parents."""
    for i in range(parent + 1, n):
        if parents[i] == parent and tokens[i] == token:
            return i
    return ROOT


@jit
def build_trie(followers: Int32, tokens: Int32, parents: Int32, counts: Int32, depths: Int32) -> int:
    """The trie of continuations [rows, width], -1 behind an end, in arrays of at most so many nodes; returns how many.

    Where the nodes run out, those begun last are missing: rows come with the best first.
    """
    n, most = 0, tokens.shape[0]
    for r in range(followers.shape[0]):
        node = ROOT
        for d in range(followers.shape[1]):
            token = followers[r, d]
            if token < 0:
                break
            child = _child(tokens, parents, n, node, token)
            if child == ROOT:
                if n == most:
                    break
                tokens[n], parents[n], counts[n], depths[n] = token, node, 0, d + 1
                child, n = n, n + 1
            counts[child] += 1
            node = child
    return n


@jit
def match_base_tree(
    tokens: Int32,
    parents: Int32,
    base_tokens: Int32,
    base_parents: Int32,
    base_scores: Float32,
    opinions: Int32,
) -> None:
    """What a drafter's tree says of each node of a trie: FIRST, LISTED, ABSENT or UNKNOWN, into ``opinions`` [n]."""
    n, base = tokens.shape[0], base_tokens.shape[0]
    same = np.full(n, -2, np.int32)  # the node of the drafter's tree with the same path
    for i in range(n):
        above = ROOT if parents[i] == ROOT else same[parents[i]]
        opinions[i] = UNKNOWN
        if above == -2:
            continue
        best = np.float32(-1.0)
        for j in range(above + 1, base):
            if base_parents[j] == above:
                opinions[i] = ABSENT if opinions[i] == UNKNOWN else opinions[i]
                best = max(best, base_scores[j])
                if base_tokens[j] == tokens[i]:
                    same[i] = j
        if same[i] >= 0:
            opinions[i] = FIRST if base_scores[same[i]] >= best else LISTED


@jit
def score_trie(
    source: int,
    length: int,
    rows: int,
    parents: Int32,
    counts: Int32,
    depths: Int32,
    opinions: Int32,
    seen: Float32,
    right: Float32,
    scores: Float32,
    cells: Int32,
) -> None:
    """Estimated probability of each node's path, into ``scores`` [n], and its cell of the counts into ``cells`` [n, 3].

    Args:
        source: Whose continuations they are.
        length: Tokens that agreed.
        rows: Continuations.
        parents: [n] of the trie, as the next three.
        counts: [n] continuations through each node.
        depths: [n] from 1.
        opinions: [n] of `judge`.
        seen: See `make_rates`.
        right: The same.
        scores: Result.
        cells: Result.
    """
    for i in range(parents.shape[0]):
        whole = rows if parents[i] == ROOT else counts[parents[i]]
        cells[i, 0] = _bin(length + depths[i] - 1, LENGTHS)
        cells[i, 1] = _share_bin(counts[i] / whole)
        cells[i, 2] = opinions[i]
        cell = source, cells[i, 0], cells[i, 1], cells[i, 2]
        scores[i] = right[cell] / seen[cell] * (np.float32(1.0) if parents[i] == ROOT else scores[parents[i]])


@jit
def update_acceptance_counts(
    source: int, tokens: Int32, parents: Int32, cells: Int32, came: Int32, seen: Float32, right: Float32
) -> None:
    """Count which nodes of a trie were right, of those whose parent was: ``came`` [a] are the tokens that followed."""
    node = ROOT
    for token in came:
        below = ROOT
        for i in range(node + 1, tokens.shape[0]):
            if parents[i] != node:
                continue
            cell = source, cells[i, 0], cells[i, 1], cells[i, 2]
            seen[cell] += 1
            if tokens[i] == token:
                right[cell] += 1
                below = i
            if seen[cell] >= FADE:
                seen[cell] /= 2
                right[cell] /= 2
        if below == ROOT:
            return
        node = below


@jit
def merge_tries(
    n: int,
    tokens: Int32,
    parents: Int32,
    scores: Float32,
    more_tokens: Int32,
    more_parents: Int32,
    more_scores: Float32,
) -> int:
    """Add a tree to one of ``n`` nodes, in arrays with room for both; where they agree the better score holds."""
    place = np.empty(more_tokens.shape[0], np.int32)
    for i in range(more_tokens.shape[0]):
        parent = ROOT if more_parents[i] == ROOT else int(place[more_parents[i]])
        at = _child(tokens, parents, n, parent, more_tokens[i])
        if at == ROOT:
            tokens[n], parents[n], scores[n] = more_tokens[i], parent, more_scores[i]
            at, n = n, n + 1
        else:
            scores[at] = max(scores[at], more_scores[i])
        place[i] = at
    return n


@jit
def fuse_trees(
    n: int,
    tokens: Int32,
    parents: Int32,
    scores: Float32,
    base_tokens: Int32,
    base_parents: Int32,
    base_scores: Float32,
) -> int:
    """Graft a drafter's tree onto the retrieved one of ``n`` nodes: where paths agree they are one (longest prefix).

    What the drafter puts beside retrieved tokens shares the probability that those leave: the drafter does not know
    what was retrieved. Below a token that both expect, its children count as much more as the token does.
    """
    retrieved = n
    taken = np.zeros(retrieved + 1, np.float32)  # of each node what its retrieved children take, [0] the root's
    for i in range(retrieved):
        above = np.float32(1.0) if parents[i] == ROOT else scores[parents[i]]
        taken[parents[i] + 1] += scores[i] / max(above, np.float32(1e-9))
    place = np.empty(base_tokens.shape[0], np.int32)
    for i in range(base_tokens.shape[0]):
        parent = ROOT if base_parents[i] == ROOT else int(place[base_parents[i]])
        above = np.float32(1.0) if parent == ROOT else scores[parent]
        alone = np.float32(1.0) if base_parents[i] == ROOT else base_scores[base_parents[i]]
        conditional = base_scores[i] / max(alone, np.float32(1e-9))
        at = _child(tokens, parents, retrieved, parent, base_tokens[i]) if parent < retrieved else ROOT
        if at == ROOT:
            left = max(np.float32(0.05), 1 - taken[parent + 1]) if parent < retrieved else np.float32(1.0)
            tokens[n], parents[n], scores[n] = base_tokens[i], parent, above * min(conditional, left)
            at, n = n, n + 1
        else:
            scores[at] = max(scores[at], above * conditional)
        place[i] = at
    # A raised score must not lie above its parent's.
    for i in range(n):
        if parents[i] != ROOT and scores[i] > scores[parents[i]]:
            scores[i] = scores[parents[i]]
    return n


def best_nodes(tokens: Int32, parents: Int32, scores: Float32, most: int) -> tuple[Int32, Int32, Float32]:
    """The likeliest nodes of a tree, at most ``most``, likeliest first; parents stay before their children."""
    return keep_nodes(np.argsort(-scores, kind="stable")[:most], tokens, parents, scores)


def keep_nodes(
    nodes: NDArray[np.int64], tokens: Int32, parents: Int32, scores: Float32
) -> tuple[Int32, Int32, Float32]:
    """Some ``nodes`` of a tree in their new order, each with its ancestors before it, numbered anew."""
    place = np.empty(len(tokens) + 1, np.int32)
    place[0] = ROOT  # of ROOT itself
    place[nodes + 1] = np.arange(len(nodes), dtype=np.int32)
    return tokens[nodes], place[parents[nodes] + 1], scores[nodes]
