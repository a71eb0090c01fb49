"""The static tree of Token Recycling (arXiv 2408.08696, section 3.3): 80 nodes below the root, six deep, 40 leaves.

The paper gives the number of nodes in each level (8, 21, 25, 15, 8 and 3), and in the subtree of each child of the
root, most probable first (49, 10, 6, 5, 3, 3, 2 and 2). It does not give the position of each node. Here a node has the
more children the more probable its path is.
"""

import numpy as np

from ..contracts import ROOT, Int32

# Children of the root and of each node, level by level; the children of a node are its candidates 0, 1, ..
CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (6, 4, 3, 2, 1, 1, 1, 0, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (4, 2, 1, 0, 0, 0, 2, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (2, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0),
    (2, 1, 0, 0, 0, 0, 0, 0),
)


def static_tree() -> tuple[Int32, Int32]:
    """Return the parent of each node, and its rank among the parent's candidates, [80] each, level by level."""
    parents: list[int] = []
    ranks: list[int] = []
    above = [ROOT]
    for level in CHILDREN:
        begin = len(parents)
        for parent, children in zip(above, level, strict=True):
            parents += [parent] * children
            ranks += range(children)
        above = list(range(begin, len(parents)))
    return np.array(parents, np.int32), np.array(ranks, np.int32)
