"""GlobalCom2: the global view of an image guides the compression of its crops (arXiv 2501.05179).

Models with AnyRes processing see an image as a base view (thumbnail) and crops. The base view tells which crops matter
(section 3.2), and both tell which tokens of a crop matter (section 3.3):

    s_i   = score of a token: its pre-softmax [CLS] logit, averaged over heads
    base view: keep the R * side^2 tokens of highest s_i
    crop j of n: r_j = R * (1 + softmax_j(sum of s_i over the base view's patches under crop j / tau) - 1/n)
    crop j: token score = normalised score in the crop + normalised score of the base view, resized to the crop
            keep the share r_j of its tokens, those of highest score

Logits, not probabilities: with probabilities all crops get equal shares at the paper's temperature. Vision towers
without [CLS] score a patch by its dissimilarity to the mean of its view. The engine's attachment computes either; see
`contracts.ImageFeatures`. Newline tokens always stay. The published code differs in two points: it keeps the newlines
of padding rows, and emits the base view's tokens in the order of their scores (``base_view_order=score``).
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
    """Options of GlobalCom2.

    Attributes:
        retain: Share of the visual tokens that is kept (R in the paper), newline tokens not counted.
        temperature: Temperature of the softmax over crops (tau in the paper); the lower, the more the shares differ.
        base_view_order: Order of the base view's tokens: ``raster``, or ``score`` as in the published code.
    """

    retain: float = 0.25
    temperature: float = 10.0
    base_view_order: Literal["raster", "score"] = "raster"

    def __post_init__(self) -> None:
        token_budget.check_retain(self.retain)
        token_budget.check_temperature(self.temperature)


class GlobalCom2(VisualPruner):
    """Prunes visual tokens, guided by the base view.

    Keeps the tokens that the base view and their crop score highest, more of them in crops that matter.
    """

    name: ClassVar[str] = "globalcom2"
    Options: ClassVar[type] = GlobalCom2Options
    needs_scores: ClassVar[bool] = True

    def __init__(self, options: GlobalCom2Options) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """Plan the same share for the base view and for the grid of crops."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> Tensor:
        """Select tokens of the base view and of every crop; see the base class."""
        assert features.scores is not None
        scores = features.scores.float()
        # Base view: the tokens of highest score.
        base_view = token_budget.top_indices(scores[0], plan.parts["base_view"])
        if self.options.base_view_order == "raster":
            base_view = base_view.sort().values
        # Score of a crop's token: its score in the crop plus its score in the base view, each normalised over the crop.
        crop_scores = grids.stitch_crops(layout, scores)
        base_scores = grids.resize_grid(scores[0].view(layout.side, layout.side), layout.grid)
        mixed = torch.zeros_like(base_scores)
        for top, bottom, left, right in layout.crop_regions:
            region = slice(top, bottom), slice(left, right)
            for values in (crop_scores[region], base_scores[region]):
                mixed[region] += functional.normalize(values.flatten(), dim=0).view(values.shape)
        # Of each crop, the tokens of highest score, as many as its share.
        counts = [0] * len(layout.crop_regions)
        if layout.grid_tokens:
            counts = self.crop_token_counts(layout, plan, scores)
        return grids.token_indices(layout, base_view, grids.top_patches_per_crop(layout, mixed, counts))

    def crop_token_counts(self, layout: ImageLayout, plan: PrunePlan, scores: Tensor) -> list[int]:
        """Return the number of tokens that each crop keeps, by `crop_shares`; they sum to the plan's number.

        Args:
            layout: Layout of the image.
            plan: The number of tokens to keep.
            scores: [views, side * side] score of every patch, the base view first.
        """
        shares = self.crop_shares(layout, scores)
        wanted = [share * tokens for share, tokens in zip(shares, layout.crop_tokens, strict=True)]
        return token_budget.allocate_tokens(layout.crop_tokens, wanted, plan.parts["crops"])

    def crop_shares(self, layout: ImageLayout, scores: Tensor) -> list[float]:
        """Return the share of its tokens that each crop keeps, r_j (section 3.2).

        Args:
            layout: Layout of the image.
            scores: [views, side * side] score of every patch, the base view first.
        """
        rows, columns = layout.crops
        side = layout.side
        # The crop under each patch of the base view.
        at = torch.arange(side, device=scores.device)
        row = (at // max(side // rows, 1)).clamp(max=rows - 1)
        column = (at // max(side // columns, 1)).clamp(max=columns - 1)
        crop = (row[:, None] * columns + column).flatten()
        # The sum of the base view's scores under each crop.
        sums = torch.zeros(rows * columns, dtype=torch.float64, device=scores.device)
        sums.index_add_(0, crop, scores[0].double())
        # r_j = R * (1 + softmax_j(sum / tau) - 1/n), at most 1
        weights = torch.softmax((sums - sums.max()) / self.options.temperature, 0)
        return (self.options.retain * (1 + weights - 1 / len(weights))).clamp(max=1.0).tolist()


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(GlobalCom2)
