"""Operations on draft trees for their verification: depths, the attention mask, sorting and truncation.

In verification the root, which is the last accepted token, is row 0. Node i of a `contracts.DraftTree` is row i + 1.
"""

import numpy as np
from numpy.typing import NDArray

from ..contracts import ROOT, DraftTree, Int32


def is_chain(parents: Int32) -> bool:
    """Return whether the tree is a chain: each node is the child of the node before it."""
    return bool((parents == np.arange(ROOT, len(parents) - 1)).all())


def node_depths(parents: Int32) -> Int32:
    """Return the depth of each node, [n]; children of the root have depth 1."""
    depths = np.empty(len(parents), np.int32)
    for node, parent in enumerate(parents.tolist()):
        depths[node] = 1 if parent == ROOT else depths[parent] + 1
    return depths


def tree_attention_mask(parents: Int32) -> NDArray[np.bool_]:
    """Return the attention mask of a tree, [n + 1, n + 1]: each row attends to the root, its ancestors and itself."""
    mask = np.eye(len(parents) + 1, dtype=bool)
    mask[0, 0] = True
    for row, parent in enumerate(parents.tolist(), start=1):
        mask[row] |= mask[parent + 1]
    return mask


def sort_by_score(tree: DraftTree) -> DraftTree:
    """Sort the nodes of a tree by descending score, so that its first nodes are the best subtree of any size.

    The score of a node is at most that of its parent, and the sort is stable, so parents stay before their children.
    """
    if (np.diff(tree.scores) <= 0).all():
        return tree
    order = np.argsort(-tree.scores, kind="stable")
    new_index = np.empty(len(order) + 1, np.int32)
    new_index[order], new_index[ROOT] = np.arange(len(order)), ROOT
    return DraftTree(tree.tokens[order], new_index[tree.parents[order]], tree.scores[order])


def truncate_tree(tree: DraftTree, nodes: int) -> DraftTree:
    """Return the first ``nodes`` nodes of a tree, which are a tree too, since parents precede their children."""
    if nodes >= len(tree):
        return tree
    return DraftTree(tree.tokens[:nodes], tree.parents[:nodes], tree.scores[:nodes])
