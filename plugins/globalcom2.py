"""GlobalCom2 (arXiv 2501.05179): the thumbnail decides how much each crop of a picture keeps.

A patch is scored by the logit between the [CLS] query and its key, averaged over heads, before the softmax: with
probabilities, shares of crops would all be alike at the paper's temperature. Towers without [CLS] score a patch by how
little it resembles the mean of its view. The attachment computes either; see `contracts.Picture`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pilotfish._internal.lazy_import import functional, torch

from .contracts import ImageFeatures, ImageLayout, PrunePlan, VisualPruner
from .hookspecs import hookimpl
from .pruning import grids, token_budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GlobalCom2Options:
    """Options.

    Attributes:
        retain: Share of the visual tokens that is kept, R in the paper; newline tokens stay besides.
        temperature: Of the softmax over crops, tau in the paper: the lower, the more unlike are their shares.
        base_view_order: Order of the thumbnail's tokens: by place, or, as in the published code, by score.
    """

    retain: float = 0.25
    temperature: float = 10.0
    base_view_order: Literal["raster", "score"] = "raster"

    def __post_init__(self) -> None:
        token_budget.check_retain(self.retain)
        token_budget.check_temperature(self.temperature)


class GlobalCom2(VisualPruner):
    """Keeps what the thumbnail and the crop itself find important, more of it in crops that stand out."""

    name: ClassVar[str] = "globalcom2"
    Options: ClassVar[type] = GlobalCom2Options
    needs_scores: ClassVar[bool] = True

    def __init__(self, options: GlobalCom2Options) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """The same share of the thumbnail and of the grid."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> Tensor:
        """The best of the thumbnail, and of each crop as many as are its share."""
        assert picture.scores is not None
        scores = picture.scores.float()
        thumbnail = token_budget.top_indices(scores[0], plan.parts["thumbnail"])
        if self.options.base_view_order == "raster":
            thumbnail = thumbnail.sort().values
        seen = grids.resize_grid(scores[0].view(layout.side, layout.side), layout.grid)
        own, mixed = grids.stitch_crops(layout, scores), torch.zeros_like(seen)
        for top, bottom, left, right in layout.crop_regions:
            part = slice(top, bottom), slice(left, right)
            for values in (own[part], seen[part]):
                mixed[part] += functional.normalize(values.flatten(), dim=0).view(values.shape)
        counts = self.crop_token_counts(layout, plan, scores) if layout.grid_tokens else [0] * len(layout.crop_regions)
        return grids.token_indices(layout, thumbnail, grids.top_patches_per_crop(layout, mixed, counts))

    def crop_token_counts(self, layout: ImageLayout, plan: PrunePlan, scores: Tensor) -> list[int]:
        """Tokens that each crop keeps: in all those of the plan, by `shares` as far as the crop has so many."""
        wanted = [share * n for share, n in zip(self.crop_shares(layout, scores), layout.crop_tokens, strict=True)]
        return token_budget.allocate_tokens(layout.crop_tokens, wanted, plan.parts["crops"])

    def crop_shares(self, layout: ImageLayout, scores: Tensor) -> list[float]:
        """The share that each crop should keep of its tokens (section 3.2): about R, more where the thumbnail looks."""
        (rows, columns), side = layout.crops, layout.side
        at = torch.arange(side, device=scores.device)
        row, column = ((at // max(side // n, 1)).clamp(max=n - 1) for n in (rows, columns))
        crop = (row[:, None] * columns + column).flatten()
        sums = torch.zeros(rows * columns, dtype=torch.float64, device=scores.device)
        sums.index_add_(0, crop, scores[0].double())
        weights = torch.softmax((sums - sums.max()) / self.options.temperature, 0)
        return (self.options.retain * (1 + weights - 1 / len(weights))).clamp(max=1.0).tolist()


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(GlobalCom2)
