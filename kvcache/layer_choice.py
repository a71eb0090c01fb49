"""Choice of TidalDecode's token selection layers, by dynamic programming.

The paper tries every possible re-selection layer of a model, one after the other. Here one pass records, for every pair
of layers, how much attention of the second layer falls outside the tokens that the first one selects. That is enough
to find the best set of selection layers of any size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerChoice:
    """A choice of full-attention layers and of window layers; all other layers are sparse.

    Attributes:
        full: First layers, before the first selection layer; they compute full attention.
        select: Token selection layers; they compute full attention too.
        loss: Attention outside the selected tokens, summed over the sparse layers.
        window: Layers that read the first and the latest tokens.
    """

    full: tuple[int, ...]
    select: tuple[int, ...]
    loss: float
    window: tuple[int, ...] = ()

    @property
    def num_full_layers(self) -> int:
        """Number of layers that compute full attention."""
        return len(self.full) + len(self.select)


def best_layer_choices(missed: NDArray[np.floating], most: int | None = None) -> list[LayerChoice]:
    """Return the choice with the least loss for every number of full-attention layers.

    Args:
        missed: [num_layers, num_layers] attention of layer ``column`` outside the tokens that layer ``row`` selects, at
            least 0.
        most: Largest number of full-attention layers to consider; all layers if not given.

    Returns:
        One choice for each number 1, 2, ..., ``most``.
    """
    layers = len(missed)
    loss = np.asarray(missed, np.float64)
    most = layers if most is None else min(most, layers)
    # between[c, e]: loss of the sparse layers c + 1 .. e - 1 when they read the tokens selected by layer c
    between = np.full((layers, layers + 1), np.inf)
    for c in range(layers):
        between[c, c + 1 :] = np.concatenate(([0.0], np.cumsum(loss[c, c + 1 :])))
    # best[n, c]: least loss of layers 0 .. c - 1 when layer c selects tokens and is the n-th full-attention layer.
    # Layers before the first selection layer compute full attention, so a first selection layer c is the (c + 1)-th.
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
    """Follow the best chain of ``n`` full-attention layers back to its first selection layer."""
    totals = best[n] + between[:, -1]
    c = int(np.argmin(totals))
    loss, select = float(totals[c]), [c]
    while back[n, c] >= 0:
        n, c = n - 1, int(back[n, c])
        select.append(c)
    return LayerChoice(tuple(range(select[-1])), tuple(select[::-1]), loss)
