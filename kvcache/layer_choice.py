"""Which layers should choose positions, found from how much attention each layer's choice misses in the others.

TidalDecode's authors try every re-selection layer of a model in turn. One pass that records, for every pair of layers,
what the choice of the one misses in the other holds all that is needed to find the best set of any size by dynamic
programming.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerChoice:
    """Layers that read everything; all others are sparse.

    Attributes:
        full: The first layers, before anything was chosen.
        select: Layers that choose.
        loss: What sparse layers miss, summed over layers.
    """

    full: tuple[int, ...]
    select: tuple[int, ...]
    loss: float

    @property
    def num_full_layers(self) -> int:
        """How many layers read everything."""
        return len(self.full) + len(self.select)


def best_layer_choices(missed: NDArray[np.floating], most: int | None = None) -> list[LayerChoice]:
    """The choice with the least loss for every number of layers that read everything.

    Args:
        missed: [layers, layers] what the column misses when it reads the row's choice, at least 0.
        most: Largest number of reading layers to consider; all if not given.

    Returns:
        One choice for each number 1, 2, ..., `most`.
    """
    layers = len(missed)
    loss = np.asarray(missed, np.float64)
    most = layers if most is None else min(most, layers)
    # between[c, e]: what the sparse layers c + 1 .. e - 1 miss when c chose for them
    between = np.full((layers, layers + 1), np.inf)
    for c in range(layers):
        between[c, c + 1 :] = np.concatenate(([0.0], np.cumsum(loss[c, c + 1 :])))
    # best[n, c]: the least loss of layers 0 .. c - 1 when c is the n-th layer that reads everything, and chooses;
    # before the first choice every layer reads everything, so a first choice at c is the (c + 1)-th
    best = np.full((most + 1, layers), np.inf)
    back = np.full((most + 1, layers), -1)
    for c in range(layers):
        if c + 1 <= most:
            best[c + 1, c] = 0.0
        for n in range(2, most + 1):
            if c == 0:
                continue
            costs = best[n - 1, :c] + between[:c, c]
            before = int(np.argmin(costs))
            if costs[before] < best[n, c]:
                best[n, c], back[n, c] = costs[before], before
    return [_walk(best, back, between, n) for n in range(1, most + 1)]


def _walk(best: NDArray[np.floating], back: NDArray[np.integer], between: NDArray[np.floating], n: int) -> LayerChoice:
    """Follow the best chain of ``n`` reading layers back to its first choice."""
    totals = best[n] + between[:, -1]
    c = int(np.argmin(totals))
    loss, select = float(totals[c]), [c]
    while back[n, c] >= 0:
        n, c = n - 1, int(back[n, c])
        select.append(c)
    return LayerChoice(tuple(range(select[-1])), tuple(select[::-1]), loss)
