"""Tries of retrieved continuations: construction, scores, and fusion with the draft tree of a base drafter.

A trie has one node for each distinct prefix of the continuations, with the number of continuations that share it. The
score of a node is an acceptance rate, given that its parent was accepted. It is learned online, by four properties of
the node: its source, the number of matching tokens up to it, its share among the continuations of its parent, and
whether the base drafter's tree lists its token (base feedback). The last one is RASD's pruning by the drafter's
distribution (arXiv 2503.03434), as a rate instead of a threshold.

Compiled with numba. Nodes follow their parents in every array.
"""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from ..contracts import ROOT
from .acceptance_counts import (
    ABSENT,
    ANY,
    BASE,
    CONDITIONALS,
    FEEDBACK_PRIOR,
    FIRST,
    LENGTHS,
    LISTED,
    MAX_COUNT,
    SHARED,
    SHARES,
    UNKNOWN,
)

Int32, Float32 = NDArray[np.int32], NDArray[np.float32]


@jit
def _bin(value: float, ends: NDArray) -> int:
    """Return the first bin whose upper edge is above ``value``."""
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
def _acceptance_rate(source: int, cell: Int32, num_verified: Float32, num_accepted: Float32) -> np.float32:
    """Return the acceptance rate of a cell [3]; with few observations, it is near the rate over all feedback."""
    of_any, of_this = (source, cell[0], cell[1], ANY), (source, cell[0], cell[1], cell[2])
    rate = num_accepted[of_any] / num_verified[of_any]
    return (num_accepted[of_this] + FEEDBACK_PRIOR * rate) / (num_verified[of_this] + FEEDBACK_PRIOR)


@jit
def _child(tokens: Int32, parents: Int32, n: int, parent: int, token: int) -> int:
    """Return the child of a node with a given token, or ROOT if there is none."""
    for i in range(parent + 1, n):
        if parents[i] == parent and tokens[i] == token:
            return i
    return ROOT


@jit
def build_trie(followers: Int32, tokens: Int32, parents: Int32, counts: Int32, depths: Int32) -> int:
    """Build the trie of continuations.

    If the output arrays are full, further nodes are omitted. They belong to the last continuations, which are the
    worst.

    Args:
        followers: [rows, width] continuations, best first; -1 after the end of a text.
        tokens: [max_nodes] tokens of the nodes; output, like the next three.
        parents: [max_nodes] parents of the nodes.
        counts: [max_nodes] number of continuations through each node.
        depths: [max_nodes] depths of the nodes, from 1.

    Returns:
        The number of nodes.
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
    feedback: Int32,
) -> None:
    """Write the base feedback of each node of a tree.

    Args:
        tokens: [n] tokens of the nodes, parents first.
        parents: [n] their parents.
        base_tokens: [m] tokens of the base drafter's tree, parents first.
        base_parents: [m] their parents.
        base_scores: [m] their scores.
        feedback: [n] FIRST, LISTED, ABSENT or UNKNOWN; output.
    """
    n, base = tokens.shape[0], base_tokens.shape[0]
    same = np.full(n, -2, np.int32)  # node of the base tree with the same path; -2 for none
    for i in range(n):
        above = ROOT if parents[i] == ROOT else same[parents[i]]
        feedback[i] = UNKNOWN
        if above == -2:
            continue
        best = np.float32(-1.0)
        for j in range(above + 1, base):
            if base_parents[j] == above:
                feedback[i] = ABSENT if feedback[i] == UNKNOWN else feedback[i]
                best = max(best, base_scores[j])
                if base_tokens[j] == tokens[i]:
                    same[i] = j
        if same[i] >= 0:
            feedback[i] = FIRST if base_scores[same[i]] >= best else LISTED


@jit
def score_trie(
    source: int,
    length: int,
    rows: int,
    parents: Int32,
    counts: Int32,
    depths: Int32,
    feedback: Int32,
    num_verified: Float32,
    num_accepted: Float32,
    scores: Float32,
    cells: Int32,
) -> None:
    """Compute the estimated acceptance probability of each node's path.

    Args:
        source: Index of the source of the continuations.
        length: Number of tokens that matched in the search.
        rows: Number of continuations.
        parents: [n] parents of the nodes.
        counts: [n] number of continuations through each node.
        depths: [n] depths of the nodes, from 1.
        feedback: [n] base feedback from `match_base_tree`.
        num_verified: Counts of verified nodes, see `make_acceptance_counts`.
        num_accepted: Counts of accepted nodes.
        scores: [n] acceptance probabilities; output.
        cells: [n, 3] indices of the nodes' counts; output.
    """
    for i in range(parents.shape[0]):
        parent_count = rows if parents[i] == ROOT else counts[parents[i]]
        cells[i, 0] = _bin(length + depths[i] - 1, LENGTHS)
        cells[i, 1] = _share_bin(counts[i] / parent_count)
        cells[i, 2] = feedback[i]
        rate = _acceptance_rate(source, cells[i], num_verified, num_accepted)
        scores[i] = rate * (np.float32(1.0) if parents[i] == ROOT else scores[parents[i]])


@jit
def _count(
    source: int, cell: Int32, feedback: int, accepted: bool, num_verified: Float32, num_accepted: Float32
) -> None:
    at = source, cell[0], cell[1], feedback
    num_verified[at] += 1
    num_accepted[at] += accepted
    if num_verified[at] >= MAX_COUNT:
        num_verified[at] /= 2
        num_accepted[at] /= 2


@jit
def update_acceptance_counts(
    source: int,
    tokens: Int32,
    parents: Int32,
    cells: Int32,
    accepted_tokens: Int32,
    num_verified: Float32,
    num_accepted: Float32,
) -> None:
    """Count the verified and the accepted nodes of a trie, among the children of accepted nodes.

    Args:
        source: Index of the source of the continuations.
        tokens: [n] tokens of the nodes.
        parents: [n] parents of the nodes.
        cells: [n, 3] indices from `score_trie` or `fuse_trees`.
        accepted_tokens: [a] tokens that were accepted or sampled after the root.
        num_verified: Counts of verified nodes; updated.
        num_accepted: Counts of accepted nodes; updated.
    """
    node = ROOT
    for token in accepted_tokens:
        below = ROOT
        for i in range(node + 1, tokens.shape[0]):
            if parents[i] != node:
                continue
            if tokens[i] == token:
                below = i
            if cells[i, 2] != SHARED:
                _count(source, cells[i], cells[i, 2], tokens[i] == token, num_verified, num_accepted)
                _count(source, cells[i], ANY, tokens[i] == token, num_verified, num_accepted)
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
    """Merge a second tree into a tree of ``n`` nodes, and return the number of nodes; equal paths get the higher score.

    Args:
        n: Number of nodes of the first tree.
        tokens: [at least n + m] tokens of the first tree, parents first; those of new nodes are appended.
        parents: [at least n + m] their parents.
        scores: [at least n + m] their scores.
        more_tokens: [m] tokens of the second tree, parents first.
        more_parents: [m] their parents.
        more_scores: [m] their scores.
    """
    index = np.empty(more_tokens.shape[0], np.int32)
    for i in range(more_tokens.shape[0]):
        parent = ROOT if more_parents[i] == ROOT else int(index[more_parents[i]])
        at = _child(tokens, parents, n, parent, more_tokens[i])
        if at == ROOT:
            tokens[n], parents[n], scores[n] = more_tokens[i], parent, more_scores[i]
            at, n = n, n + 1
        else:
            scores[at] = max(scores[at], more_scores[i])
        index[i] = at
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
    num_verified: Float32,
    num_accepted: Float32,
    cells: Int32,
) -> int:
    """Merge the base drafter's tree into a retrieved tree of ``n`` nodes, and return the number of nodes.

    Equal paths become one (longest prefix). They keep the score of the retrieved tree, in which base
    feedback counts already. The base drafter does not know what was retrieved, so each of its other tokens gets the
    acceptance rate of such tokens: of its conditional score, and of the probability of its retrieved siblings.

    Args:
        n: Number of nodes of the retrieved tree.
        tokens: [room] tokens of the retrieved tree; tokens of the base tree are appended, as in the next two.
        parents: [room] parents.
        scores: [room] acceptance probabilities.
        base_tokens: [m] tokens of the base tree.
        base_parents: [m] parents of the base tree.
        base_scores: [m] acceptance probabilities, as the base drafter estimates them.
        num_verified: Counts of verified nodes of the base tree, from `make_acceptance_counts`.
        num_accepted: Counts of its accepted nodes.
        cells: [m, 3] indices of the nodes' counts; output.
    """
    retrieved = n
    taken = np.zeros(retrieved + 1, np.float32)  # probability of each node's retrieved children; [0] for the root
    for i in range(retrieved):
        above = np.float32(1.0) if parents[i] == ROOT else scores[parents[i]]
        taken[parents[i] + 1] += scores[i] / max(above, np.float32(1e-9))
    index = np.empty(base_tokens.shape[0], np.int32)
    for i in range(base_tokens.shape[0]):
        parent = ROOT if base_parents[i] == ROOT else int(index[base_parents[i]])
        at = _child(tokens, parents, retrieved, parent, base_tokens[i]) if parent < retrieved else ROOT
        base_above = np.float32(1.0) if base_parents[i] == ROOT else base_scores[base_parents[i]]
        cells[i, 0] = _bin(base_scores[i] / max(base_above, np.float32(1e-9)), CONDITIONALS)
        cells[i, 1] = _share_bin(taken[parent + 1]) if parent < retrieved else len(SHARES)
        cells[i, 2] = UNKNOWN if at == ROOT else SHARED
        if at == ROOT:
            rate = _acceptance_rate(BASE, cells[i], num_verified, num_accepted)
            tokens[n], parents[n] = base_tokens[i], parent
            scores[n] = rate * (np.float32(1.0) if parent == ROOT else scores[parent])
            at, n = n, n + 1
        index[i] = at
    return n


def best_nodes(tokens: Int32, parents: Int32, scores: Float32, most: int) -> tuple[Int32, Int32, Float32]:
    """Return the nodes of highest score, at most ``most``, in descending order; parents stay before their children."""
    return keep_nodes(np.argsort(-scores, kind="stable")[:most], tokens, parents, scores)


def keep_nodes(
    nodes: NDArray[np.int64], tokens: Int32, parents: Int32, scores: Float32
) -> tuple[Int32, Int32, Float32]:
    """Return the subtree of ``nodes`` in the given order, with new indices; ancestors come before their descendants."""
    index = np.empty(len(tokens) + 1, np.int32)
    index[0] = ROOT  # the parent of the root's children
    index[nodes + 1] = np.arange(len(nodes), dtype=np.int32)
    return tokens[nodes], index[parents[nodes] + 1], scores[nodes]
