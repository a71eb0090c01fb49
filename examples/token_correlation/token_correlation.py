"""Token-level Correlation-guided Compression (arXiv 2407.14439): crops full of repetition keep less.

Two correlations, both of the paper: between the patches of a crop (how much of it repeats itself, and so how dense its
information is) and between [CLS] and each patch (which patches carry it). The paper lets the density decide how many
tokens a picture keeps; an engine has to know that before it sees the picture, so that here the density divides a fixed
number among the crops. Patches are compared by the features that the language model gets, not by keys of the tower.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pilotfish.plugins import hookimpl
from pilotfish.plugins.contracts import ImageLayout, Picture, PrunePlan, VisualPruner
from pilotfish.plugins.pruning import grids
from pilotfish.plugins.pruning.shares import allocate, check_retain


@dataclass(frozen=True)
class TokenCorrelationOptions:
    """Options of the example.

    Attributes:
        retain: Share of the visual tokens that is kept; newline tokens stay besides.
        similar: Cosine above which two patches show the same.
        repeats: So many others that show the same make a patch redundant.
    """

    retain: float = 0.25
    similar: float = 0.8
    repeats: int = 8

    def __post_init__(self) -> None:
        check_retain(self.retain)
        if not 0 < self.similar < 1:
            raise ValueError(f"similar: expected between 0 and 1, got {self.similar}")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {self.repeats}")


class TokenCorrelation(VisualPruner):
    """Shares by density of information, tokens by [CLS]."""

    name: ClassVar[str] = "token_correlation"
    Options: ClassVar[type] = TokenCorrelationOptions
    scored: ClassVar[bool] = True

    def __init__(self, options: TokenCorrelationOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """The same share of the thumbnail and of all crops together."""
        thumbnail, cells = int(layout.first * self.options.retain), int(layout.cells * self.options.retain)
        parts = {"thumbnail": thumbnail, "crops": cells, "newlines": layout.newlines}
        return PrunePlan(sum(parts.values()), parts)

    def select(self, layout: ImageLayout, plan: PrunePlan, picture: Picture) -> Tensor:
        """The patches of highest score, of each crop as many as its density earns."""
        assert picture.scores is not None
        thumbnail = best(picture.scores[0], plan.parts["thumbnail"])
        blocks = grids.blocks(layout, picture.tokens.device)[1:]
        keep = torch.zeros(layout.grid, dtype=torch.bool, device=picture.tokens.device)
        if blocks:
            scores = grids.stitch(layout, picture.scores)
            parts = [r for r in layout.rectangles if r[1] > r[0] and r[3] > r[2]]
            density = [self.density(picture.tokens[block]) for block in blocks]
            total = sum(d * len(b) for d, b in zip(density, blocks, strict=True)) or 1.0
            wanted = [plan.parts["crops"] * d * len(b) / total for d, b in zip(density, blocks, strict=True)]
            counts = allocate([len(b) for b in blocks], wanted, plan.parts["crops"])
            for (top, bottom, left, right), count in zip(parts, counts, strict=True):
                chosen = torch.zeros((bottom - top) * (right - left), dtype=torch.bool, device=keep.device)
                chosen[best(scores[top:bottom, left:right].flatten(), count)] = True
                keep[top:bottom, left:right] = chosen.view(bottom - top, right - left)
        return grids.places(layout, thumbnail, keep)

    def density(self, tokens: Tensor) -> float:
        """Share of the tokens [n, width] that are not redundant."""
        unit = functional.normalize(tokens.float(), dim=-1)
        alike = (unit @ unit.T > self.options.similar).sum(1) - 1
        return float((alike < self.options.repeats).float().mean())


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the highest scores, ascending."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(TokenCorrelation)
