"""Token-level Correlation-guided Compression (arXiv 2407.14439): crops full of repetition keep less.

Two correlations, both of the paper: between the patches of a crop (how much of it repeats itself, and so how dense its
information is) and between [CLS] and each patch (which patches carry it). The paper lets the density decide how many
tokens a picture keeps; an engine has to know that before it sees the picture, so that here the density divides a fixed
number among the crops. Patches are compared by the features that the language model gets, not by keys of the tower.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from pilotfish.plugins import hookimpl
from pilotfish.plugins.contracts import ImageFeatures, ImageLayout, PrunePlan, VisualPruner
from pilotfish.plugins.pruning import grids, token_budget


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
        token_budget.check_retain(self.retain)
        if not 0 < self.similar < 1:
            raise ValueError(f"similar: expected between 0 and 1, got {self.similar}")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {self.repeats}")


class TokenCorrelation(VisualPruner):
    """Shares by density of information, tokens by [CLS]."""

    name: ClassVar[str] = "token_correlation"
    Options: ClassVar[type] = TokenCorrelationOptions
    needs_scores: ClassVar[bool] = True

    def __init__(self, options: TokenCorrelationOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """The same share of the thumbnail and of all crops together."""
        return token_budget.plan_tokens(layout, self.options.retain)

    def select(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> Tensor:
        """The patches of highest score, of each crop as many as its density earns."""
        assert picture.scores is not None
        thumbnail = token_budget.top_indices(picture.scores[0], plan.parts["base_view"]).sort().values
        blocks = grids.view_token_indices(layout, picture.tokens.device)[layout.frames :]
        earned = iter([self.density(picture.tokens[block]) for block in blocks])
        weights = [n * next(earned) if n else 0.0 for n in layout.crop_tokens]  # a crop of padding alone is no block
        wanted = [plan.parts["crops"] * w / (sum(weights) or 1.0) for w in weights]
        counts = token_budget.allocate_tokens(layout.crop_tokens, wanted, plan.parts["crops"])
        keep = grids.top_patches_per_crop(layout, grids.stitch_crops(layout, picture.scores), counts)
        return grids.token_indices(layout, thumbnail, keep)

    def density(self, tokens: Tensor) -> float:
        """Share of the tokens [n, width] that are not redundant."""
        unit = functional.normalize(tokens.float(), dim=-1)
        alike = (unit @ unit.T > self.options.similar).sum(1) - 1
        return float((alike < self.options.repeats).float().mean())


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(TokenCorrelation)
