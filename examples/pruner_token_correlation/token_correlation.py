"""Token-level Correlation-guided Compression (arXiv 2407.14439): repetitive crops keep fewer tokens.

The method uses two correlations of the paper: between the patches of a crop (how repetitive it is, and so how dense its
information), and between [CLS] and each patch (which patches carry the information). In the paper, the density decides
how many tokens an image keeps; an engine has to know that number before it processes the image, so here the density
divides a fixed number of tokens among the crops. Patches are compared by the features that the language model gets, not
by keys of the vision encoder.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from pilotfish import ImageFeatures, ImageLayout, PrunePlan, VisualPruner, hookimpl
from pilotfish.plugins.pruning import grids, token_budget


@dataclass(frozen=True)
class TokenCorrelationOptions:
    """Options of the example.

    Attributes:
        retain: Share of the visual tokens to keep; newline tokens are kept in addition.
        similar: Cosine similarity above which two patches count as repetitions.
        repeats: Number of other repetitions that make a patch redundant.
    """

    retain: float = 0.25
    similar: float = 0.8
    repeats: int = 8

    def __post_init__(self) -> None:
        token_budget.check_retain(self.retain)
        if not 0 < self.similar < 1:
            raise ValueError(f"similar: expected between 0 and 1, got {self.similar}")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {self.repeats}")


class TokenCorrelation(VisualPruner):
    """Visual pruner that allocates tokens to crops by information density, and selects them by [CLS] attention."""

    name: ClassVar[str] = "token_correlation"
    Options: ClassVar[type] = TokenCorrelationOptions
    needs_scores: ClassVar[bool] = True

    def __init__(self, options: TokenCorrelationOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """Keep the same share of the base view and of all crops together."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> Tensor:
        """Select the patches with the highest scores, in each crop as many as its density allows."""
        assert features.scores is not None
        base_view = token_budget.top_indices(features.scores[0], plan.parts["base_view"]).sort().values
        blocks = grids.view_token_indices(layout, features.tokens.device)[layout.frames :]
        densities = iter([self.density(features.tokens[block]) for block in blocks])
        weights = [n * next(densities) if n else 0.0 for n in layout.crop_tokens]  # crops of padding have no block
        wanted = [plan.parts["crops"] * w / (sum(weights) or 1.0) for w in weights]
        counts = token_budget.allocate_tokens(layout.crop_tokens, wanted, plan.parts["crops"])
        keep = grids.top_patches_per_crop(layout, grids.stitch_crops(layout, features.scores), counts)
        return grids.token_indices(layout, base_view, keep)

    def density(self, tokens: Tensor) -> float:
        """Return the share of the tokens, [n, width], that are not redundant."""
        unit = functional.normalize(tokens.float(), dim=-1)
        alike = (unit @ unit.T > self.options.similar).sum(1) - 1
        return float((alike < self.options.repeats).float().mean())


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(TokenCorrelation)
