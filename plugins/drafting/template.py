"""The static tree of Token Recycling (arXiv 2408.08696, section 3.3): 80 nodes below the root, six deep, 40 leaves.

The paper gives the tree's counts: 8, 21, 25, 15, 8 and 3 nodes a level; 49, 10, 6, 5, 3, 3, 2 and 2 below and with the
root's children, the likeliest first. Where within those counts a node stands is ours: the likelier a path, the more
children it has.
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
    """Of each node its parent and its rank among the parent's candidates, [80] each, level by level."""
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
