"""Tokens that resemble each other least: no attention is asked, so that any tower will do.

``farthest``: each token that is taken is the one whose nearest among those taken is farthest (Gonzalez 1985, as in
DivPrune, arXiv 2503.02175). They are compared by random projections of theirs, which keep angles (Johnson and
Lindenstrauss 1984): what is chosen covers a picture as well, and matrices are many times smaller. ``determinantal``:
each is the one that enlarges the determinant of their similarities most (greedy inference for determinantal point
processes, arXiv 1709.05135).
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

PROJECTION_DIM = 64  # dimensions that tokens are projected to before they are compared


@dataclass(frozen=True)
class DiversityOptions:
    """Options.

    Attributes:
        retain: Share of the visual tokens that is kept; newline tokens stay besides.
        method: What unlike means: far from the nearest one taken, or adding most to the determinant of all taken.
    """

    retain: float = 0.25
    method: Literal["farthest", "determinantal"] = "farthest"

    def __post_init__(self) -> None:
        token_budget.check_retain(self.retain)


class Diversity(VisualPruner):
    """Keeps tokens that differ, of the thumbnail or each frame, and of the whole grid."""

    name: ClassVar[str] = "diversity"
    Options: ClassVar[type] = DiversityOptions
    prunes_videos: ClassVar[bool] = True

    def __init__(self, options: DiversityOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """The same share of every view before the grid, and of the grid."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> Tensor:
        """Views one by one, then the grid."""
        choose, tokens = select_determinantal, picture.tokens
        if self.options.method == "farthest":
            choose, tokens = select_farthest, random_projection(tokens)
        view, per_view = layout.side * layout.side, plan.parts["thumbnail"] // layout.frames
        first = [i * view + choose(tokens[i * view : (i + 1) * view], per_view) for i in range(layout.frames)]
        keep = torch.zeros(layout.grid_tokens, dtype=torch.bool, device=tokens.device)
        if layout.grid_tokens:
            keep[choose(grids.grid_values(layout, tokens).flatten(0, 1), plan.parts["crops"])] = True
        return grids.token_indices(layout, torch.cat(first), keep.view(layout.grid))


def random_projection(tokens: Tensor) -> Tensor:
    """[n, SKETCH] random projections of tokens [n, width], always the same ones; narrow tokens as they are."""
    width = tokens.shape[-1]
    if width <= PROJECTION_DIM:
        return tokens
    directions = torch.randn(width, PROJECTION_DIM, generator=torch.Generator().manual_seed(0))
    return tokens.float() @ directions.to(tokens.device)


def select_farthest(tokens: Tensor, count: int) -> Tensor:
    """[count] places, ascending, of tokens [n, width], by the cosine; the first is the one least like the mean."""
    unit = functional.normalize(tokens.float(), dim=-1)
    similar = (unit @ unit.T).cpu().numpy()  # numpy's calls are an order quicker than torch's, on any device
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
    """[count] places, ascending, of tokens [n, width], by the fast greedy algorithm: a Cholesky row for each choice.

    Any first choice would do; it is that of `farthest`. Once what is left adds nothing, as when tokens repeat, the
    order of places decides.
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
