"""What a draft tree means to the engine that verifies it: depths, who sees whom, and the walk along what was drawn.

In verification the root, the last accepted token, is row 0, and node i of a `contracts.DraftTree` row i + 1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..contracts import ROOT, DraftTree, Int32


def is_chain(parents: Int32) -> bool:
    """Whether each node follows the one before it."""
    return bool((parents == np.arange(ROOT, len(parents) - 1)).all())


def node_depths(parents: Int32) -> Int32:
    """How far each node is from the root, [n]; 1 for its children."""
    found = np.empty(len(parents), np.int32)
    for node, parent in enumerate(parents.tolist()):
        found[node] = 1 if parent == ROOT else found[parent] + 1
    return found


def tree_attention_mask(parents: Int32) -> NDArray[np.bool_]:
    """What each row sees of the tree, [n + 1, n + 1]: the root, its ancestors and itself."""
    seen = np.eye(len(parents) + 1, dtype=bool)
    seen[0, 0] = True
    for row, parent in enumerate(parents.tolist(), start=1):
        seen[row] |= seen[parent + 1]
    return seen


def accept_sampled_path(
    tokens: Sequence[int], parents: Sequence[int], drawn: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Follow the model's draws down the tree.

    At every row a token was drawn from the model's distribution there. Where it is a child of the row, that child is
    accepted and the walk goes on below it; else it ends with that token. So each token of the output was drawn from
    the model's distribution behind those before it, whatever the tree.

    Args:
        tokens: [n] of the nodes.
        parents: [n] of the nodes.
        drawn: [n + 1] the token drawn at each row.

    Returns:
        The accepted nodes from the root down, [a], and the output tokens, [a + 1].
    """
    child: dict[tuple[int, int], int] = {}
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        child.setdefault((parent, token), node)
    path: list[int] = []
    output = [drawn[0]]
    node = ROOT
    while (node := child.get((node, output[-1]), -2)) >= 0:
        path.append(node)
        output.append(drawn[node + 1])
    return path, output


def sort_by_score(tree: DraftTree) -> DraftTree:
    """The same tree in the order of falling scores, in which every beginning is the best tree of its size.

    No score is above its parent's, and equal ones keep their order, so parents stay before their children.
    """
    if (np.diff(tree.scores) <= 0).all():
        return tree
    order = np.argsort(-tree.scores, kind="stable")
    place = np.empty(len(order) + 1, np.int32)
    place[order], place[ROOT] = np.arange(len(order)), ROOT
    return DraftTree(tree.tokens[order], place[tree.parents[order]], tree.scores[order])


def truncate_tree(tree: DraftTree, nodes: int) -> DraftTree:
    """The first ``nodes`` of a tree; parents come before their children, so it is one too."""
    if nodes >= len(tree):
        return tree
    return DraftTree(tree.tokens[:nodes], tree.parents[:nodes], tree.scores[:nodes])
