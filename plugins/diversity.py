"""Diversity: keep the visual tokens that differ most from each other.

It needs no attention, so it works with any vision encoder.

``farthest`` is farthest-point sampling (Gonzalez 1985, as in DivPrune, arXiv 2503.02175): the next token is the one
whose nearest selected token is farthest. Tokens are compared by random projections, which preserve angles (Johnson and
Lindenstrauss 1984) in much smaller matrices. ``determinantal`` is greedy inference for determinantal point processes
(arXiv 1709.05135): the next token is the one that enlarges the determinant of the similarity matrix most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pilotfish._internal.lazy_import import functional, torch

from .contracts import ImageFeatures, ImageLayout, PrunePlan, VisualPruner
from .hookspecs import hookimpl
from .pruning import grids, token_budget

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION_DIM = 64


@dataclass(frozen=True)
class DiversityOptions:
    """Options of the diversity pruner.

    Attributes:
        retain: Share of the visual tokens that is kept, newline tokens not counted.
        method: ``farthest`` for farthest-point sampling, ``determinantal`` for a determinantal point process.
    """

    retain: float = 0.25
    method: Literal["farthest", "determinantal"] = "farthest"

    def __post_init__(self) -> None:
        token_budget.check_retain(self.retain)


class Diversity(VisualPruner):
    """Keeps the most diverse visual tokens.

    Tokens are selected in the base view or each frame, and in the grid.
    """

    name: ClassVar[str] = "diversity"
    Options: ClassVar[type] = DiversityOptions
    prunes_videos: ClassVar[bool] = True

    def __init__(self, options: DiversityOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """Plan the same share for every view before the grid, and for the grid."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> Tensor:
        """Select tokens of each view, then of the grid; see the base class."""
        choose, tokens = select_determinantal, features.tokens
        if self.options.method == "farthest":
            choose, tokens = select_farthest, random_projection(tokens)
        view, per_view = layout.side * layout.side, plan.parts["base_view"] // layout.frames
        first = [i * view + choose(tokens[i * view : (i + 1) * view], per_view) for i in range(layout.frames)]
        keep = torch.zeros(layout.grid_tokens, dtype=torch.bool, device=tokens.device)
        if layout.grid_tokens:
            keep[choose(grids.grid_values(layout, tokens).flatten(0, 1), plan.parts["crops"])] = True
        return grids.token_indices(layout, torch.cat(first), keep.view(layout.grid))


def random_projection(tokens: Tensor) -> Tensor:
    """Project tokens [n, width] to [n, PROJECTION_DIM] with a fixed seed; narrow tokens are returned unchanged."""
    width = tokens.shape[-1]
    if width <= PROJECTION_DIM:
        return tokens
    directions = torch.randn(width, PROJECTION_DIM, generator=torch.Generator().manual_seed(0))
    return tokens.float() @ directions.to(tokens.device)


def select_farthest(tokens: Tensor, count: int) -> Tensor:
    """Return the indices [count], ascending, of the tokens [n, width] selected by farthest-point sampling.

    Distance is the cosine; the first token is the one least similar to the mean.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    similar = (unit @ unit.T).cpu().numpy()  # NumPy's calls are ten times faster than torch's here, on any device
    nearest = np.full(len(similar), -2.0, np.float32)
    chosen = np.empty(count, np.int64)
    at = int((unit @ unit.mean(0)).argmin())
    for i in range(count):
        chosen[i] = at
        np.maximum(nearest, similar[at], out=nearest)
        nearest[at] = np.inf
        at = int(nearest.argmin())
    return torch.from_numpy(np.sort(chosen)).to(tokens.device)


def select_determinantal(tokens: Tensor, count: int) -> Tensor:
    """Return the indices [count], ascending, of the tokens [n, width] selected by the fast greedy algorithm.

    It computes one row of a Cholesky factor per selected token. The first token is that of `select_farthest`. Where the
    remaining tokens add nothing, as when tokens repeat, the lowest index is taken.
    """
    unit = functional.normalize(tokens.double(), dim=-1)
    similar = unit @ unit.T
    gain = similar.diagonal().clone()
    rows = similar.new_zeros(count, len(unit))
    chosen = torch.empty(count, dtype=torch.long, device=tokens.device)
    at = (unit @ unit.mean(0)).argmin()
    for i in range(count):
        chosen[i] = at
        root = gain[at].clamp(min=1e-12).sqrt()
        rows[i] = (similar[at] - rows[:i, at] @ rows[:i]) / root
        gain = gain - rows[i] ** 2
        gain[chosen[: i + 1]] = -torch.inf
        at = gain.argmax()
    return chosen.sort().values


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(Diversity)
