"""The adjacency matrix of Token Recycling (arXiv 2408.08696, section 3), with further rows for longer contexts.

A *row* lists the model's k most probable tokens after a context. Rows 0 .. vocab-1 belong to contexts of one token, as
in the paper. After them follow ``2**bits`` rows for contexts of 2 .. ``order`` tokens. They are addressed by a hash
(direct-mapped, the newest context replaces an older one). The row of the longest known context is used; the paper's row
is the fallback.

Each candidate has a one-byte *confidence*: the bin of its probability, or `FROM_TEXT` if it comes from a prompt and no
probability is known. `update_acceptance_rates` counts how often candidates of each order, rank and confidence are
right. `grow_tree` scores the nodes of a draft tree with these rates.

Compiled with numba, single-threaded. All arrays are allocated once.
"""

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit

from .adjacency_table import BIN_EDGES, FROM_TEXT, MAX_SEEN, NONE, AcceptanceRates, AdjacencyTable


@jit
def _context_hash(tail: NDArray[np.int32], length: int) -> np.uint64:
    """Return a hash of the last ``length`` tokens of ``tail``; never 0, which marks an empty slot."""
    x = np.uint64(length) * np.uint64(0xC2B2AE3D27D4EB4F)  # so that contexts of different lengths differ
    for i in range(tail.shape[0] - length, tail.shape[0]):
        x = (x ^ np.uint64(tail[i])) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
    return x | np.uint64(1)


@jit
def _row_of_token(token: int, vocab: int) -> "int | np.int64":
    """Return the row of a token; ids outside the vocabulary use row 0, since compiled code does not check bounds."""
    return np.int64(token) if 0 <= token < vocab else np.int64(0)


@jit
def find_row(rows: AdjacencyTable, tail: NDArray[np.int32], order: int) -> "tuple[int | np.int64, int]":
    """Return the row of the longest known context at the end of ``tail`` [t >= 1], and the length of that context."""
    slots = rows.keys.shape[0]
    vocab = rows.tokens.shape[0] - slots
    for length in range(min(order, tail.shape[0]), 1, -1):
        key = _context_hash(tail, length)
        slot = np.int64((key >> np.uint64(1)) & np.uint64(slots - 1))
        if rows.keys[slot] == key:
            return vocab + slot, length
    return _row_of_token(tail[-1], vocab), 1


@jit
def _claim_row(rows: AdjacencyTable, tail: NDArray[np.int32], length: int) -> "int | np.int64":
    """Return the row for the last ``length`` tokens of ``tail``; clear it if it belonged to another context."""
    slots = rows.keys.shape[0]
    if length == 1:
        return _row_of_token(tail[-1], rows.tokens.shape[0] - slots)
    key = _context_hash(tail, length)
    slot = np.int64((key >> np.uint64(1)) & np.uint64(slots - 1))
    row = rows.tokens.shape[0] - slots + slot
    if rows.keys[slot] != key:
        rows.keys[slot] = key
        rows.tokens[row, :] = NONE
    return row


@jit
def _path_context(
    context: NDArray[np.int32], inputs: NDArray[np.int32], parents: NDArray[np.int32], node: int, out: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the latest tokens up to and including ``node`` of a tree after ``context``, as a view of ``out``."""
    filled = 0
    size = out.shape[0]
    while node != NONE and filled < size:
        out[size - 1 - filled] = inputs[node]
        filled += 1
        node = parents[node]
    at = context.shape[0] - 1
    while at >= 0 and filled < size:
        out[size - 1 - filled] = context[at]
        filled += 1
        at -= 1
    return out[size - filled :]


@jit
def confidence_bin(prob: float) -> int:
    """Return the confidence bin of a probability."""
    for i in range(BIN_EDGES.shape[0]):
        if prob > BIN_EDGES[i]:
            return i
    return BIN_EDGES.shape[0]


@jit
def update_rows(
    rows: AdjacencyTable,
    order: int,
    context: NDArray[np.int32],
    inputs: NDArray[np.int32],
    parents: NDArray[np.int32],
    accepted: NDArray[np.bool_],
    ids: NDArray[np.int32],
    probs: NDArray[np.float32],
) -> None:
    """Overwrite the rows of all verified tokens, rejected ones included, with the model's top-k tokens (section 3.2).

    If several positions write the same row, the deepest accepted one must win, else the first one. So rejected
    positions are written in reverse order, and then accepted ones in order.

    Args:
        rows: The table; updated.
        order: Longest context with its own rows, in tokens.
        context: [m] tokens before the verified ones, the last one at the end.
        inputs: [n] verified tokens.
        parents: [n] index of the token before each one; `ROOT` for the first.
        accepted: [n] whether each token was accepted.
        ids: [n, k] the model's top-k tokens after each token, the most probable first.
        probs: [n, k] their probabilities.
    """
    buffer = np.empty(order, np.int32)
    n = inputs.shape[0]
    for step in range(2 * n):
        node = n - 1 - step if step < n else step - n
        if accepted[node] != (step >= n) or ids[node, 0] < 0:
            continue
        tail = _path_context(context, inputs, parents, node, buffer)
        for length in range(1, tail.shape[0] + 1):
            row = _claim_row(rows, tail, length)
            for rank in range(ids.shape[1]):
                rows.tokens[row, rank] = ids[node, rank]
                rows.confidence[row, rank] = confidence_bin(probs[node, rank])


@jit
def prime_from_text(rows: AdjacencyTable, order: int, text: NDArray[np.int32]) -> None:
    """Insert the token after each context of a text [t] at the first rank of the context's rows."""
    k = rows.tokens.shape[1]
    for i in range(text.shape[0] - 1):
        follower = text[i + 1]
        for length in range(1, min(order, i + 1) + 1):
            row = _claim_row(rows, text[i + 1 - length : i + 1], length)
            at = k - 1
            for rank in range(k):
                if rows.tokens[row, rank] == follower or rows.tokens[row, rank] == NONE:
                    at = rank
                    break
            for rank in range(at, 0, -1):
                rows.tokens[row, rank] = rows.tokens[row, rank - 1]
                rows.confidence[row, rank] = rows.confidence[row, rank - 1]
            rows.tokens[row, 0] = follower
            rows.confidence[row, 0] = FROM_TEXT


@jit
def update_acceptance_rates(
    rows: AdjacencyTable, acceptance: AcceptanceRates, order: int, context: NDArray[np.int32], tokens: NDArray[np.int32]
) -> None:
    """Count which candidates were right for each of ``tokens`` [a] that followed ``context`` [m >= 1].

    The counts of a cell are halved at `MAX_SEEN` observations, so that recent ones weigh more.
    """
    text = np.concatenate((context, tokens))
    for i in range(context.shape[0], text.shape[0]):
        row, length = find_row(rows, text[max(0, i - order) : i], order)
        for rank in range(rows.tokens.shape[1]):
            token = rows.tokens[row, rank]
            if token == NONE:
                break
            cell = length, rank, rows.confidence[row, rank]
            acceptance.seen[cell] += 1
            if token == text[i]:
                acceptance.right[cell] += 1
            acceptance.rate[cell] = acceptance.right[cell] / acceptance.seen[cell]
            if acceptance.seen[cell] >= MAX_SEEN:
                acceptance.seen[cell] /= 2
                acceptance.right[cell] /= 2


@jit
def grow_tree(
    rows: AdjacencyTable,
    rate: NDArray[np.float32],
    order: int,
    context: NDArray[np.int32],
    max_nodes: int,
    max_depth: int,
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> int:
    """Grow a draft tree below the last token of ``context`` [m >= 1], at each step by the node of highest score.

    Nodes are written to the three output arrays, parents before children; their number is returned. The frontier holds
    only the next candidate of each open row, since rows are sorted by probability. It has at most ``room`` entries.
    """
    k = rows.tokens.shape[1]
    room = 2 * max_nodes + 2
    f_score, f_parent = np.empty(room, np.float32), np.empty(room, np.int32)
    f_row, f_length, f_rank = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    f_base = np.empty(room, np.float32)  # score of the parent
    depths = np.empty(max_nodes, np.int32)
    buffer = np.empty(order, np.int32)
    f, n = 0, 0

    row, length = find_row(rows, context[max(0, context.shape[0] - order) :], order)
    parent, rank, base = NONE, 0, np.float32(1.0)
    while True:
        if rank < k and rows.tokens[row, rank] != NONE:  # add the next candidate of (row, parent) to the frontier
            f_row[f], f_length[f], f_rank[f], f_parent[f], f_base[f] = row, length, rank, parent, base
            f_score[f] = base * rate[length, rank, rows.confidence[row, rank]]
            f += 1
        if n == max_nodes or f == 0:
            return n
        best = np.argmax(f_score[:f])
        row, length, rank, parent, base = f_row[best], f_length[best], f_rank[best], f_parent[best], f_base[best]
        score = f_score[best]
        tokens[n], parents[n], scores[n] = rows.tokens[row, rank], parent, score
        depths[n] = 1 if parent == NONE else depths[parent] + 1

        f -= 1  # remove the node from the frontier
        f_row[best], f_length[best], f_rank[best] = f_row[f], f_length[f], f_rank[f]
        f_parent[best], f_base[best], f_score[best] = f_parent[f], f_base[f], f_score[f]
        if depths[n] < max_depth:
            child_row, child_length = find_row(rows, _path_context(context, tokens, parents, n, buffer), order)
            if rows.tokens[child_row, 0] != NONE:
                f_row[f], f_length[f], f_rank[f], f_parent[f], f_base[f] = child_row, child_length, 0, n, score
                f_score[f] = score * rate[child_length, 0, rows.confidence[child_row, 0]]
                f += 1
        n += 1
        rank += 1


@jit
def fill_static_tree(
    rows: AdjacencyTable,
    rate: NDArray[np.float32],
    order: int,
    context: NDArray[np.int32],
    shape: NDArray[np.int32],
    ranks: NDArray[np.int32],
    max_nodes: int,
    max_depth: int,
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> int:
    """Fill a static tree below the last token of ``context`` [m >= 1] from the rows (section 3.3).

    Nodes for which the row has no candidate of their rank are omitted, with their descendants.

    Args:
        rows: Adjacency table.
        rate: Acceptance rates, see `make_acceptance_rates`.
        order: Longest context with its own rows, in tokens.
        context: [m] latest tokens of the text.
        shape: [nodes] parents of the static tree's nodes, level by level.
        ranks: [nodes] rank of each node among its parent's candidates.
        max_nodes: Largest number of nodes; later ones are omitted.
        max_depth: Largest depth of a node.
        tokens: [max_nodes] tokens of the nodes; output.
        parents: [max_nodes] parents of the nodes; output.
        scores: [max_nodes] scores of the nodes; output.

    Returns:
        The number of nodes.
    """
    index = np.full(shape.shape[0], NONE, np.int32)  # position of each static node in the output
    depths = np.empty(max_nodes, np.int32)
    buffer = np.empty(order, np.int32)
    tail = context[max(0, context.shape[0] - order) :]
    n = 0
    for node in range(shape.shape[0]):
        if n == max_nodes:
            break
        parent = NONE if shape[node] == NONE else int(index[shape[node]])
        if shape[node] != NONE and parent == NONE:
            continue
        depth = 1 if parent == NONE else depths[parent] + 1
        if depth > max_depth:
            break
        row, length = find_row(
            rows, tail if parent == NONE else _path_context(context, tokens, parents, parent, buffer), order
        )
        token = rows.tokens[row, ranks[node]] if ranks[node] < rows.tokens.shape[1] else NONE
        if token == NONE:
            continue
        above = np.float32(1.0) if parent == NONE else scores[parent]
        tokens[n], parents[n], depths[n] = token, parent, depth
        scores[n] = above * rate[length, ranks[node], rows.confidence[row, ranks[node]]]
        index[node] = n
        n += 1
    return n
