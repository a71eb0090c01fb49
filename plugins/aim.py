"""AIM (arXiv 2412.03248): visual tokens that look alike are merged; if wished, others leave layer by layer.

The second part is an experiment by its nature: it recomputes attention metadata for each layer, wants whole prompts and
frees no memory. Merging alone saves about nine tenths of what both save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pilotfish._internal.lazy_import import functional, torch

from .contracts import ImageFeatures, ImageLayout, LayerSchedule, PrunePlan, VisualPruner
from .hookspecs import hookimpl
from .pruning import grids
from .pruning.token_budget import check_temperature

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AIMOptions:
    """Options.

    Attributes:
        merge_steps: How often about half of the tokens go: after two steps a quarter is left, after none all are.
        order: Order of what is left: by place, or, as in the published code, unmerged tokens first.
        experimental_layers: Layers between which visual tokens leave the language model, as [14, 22]; none when None.
        temperature: Of the attention that tells which leave first.
        iterations: Of the page rank over that attention.
    """

    merge_steps: int = 2
    order: Literal["raster", "published"] = "raster"
    experimental_layers: tuple[int, ...] | None = None
    temperature: float = 0.1
    iterations: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.merge_steps <= 6:
            raise ValueError(f"merge_steps: expected 0 to 6, got {self.merge_steps}")
        layers = self.experimental_layers
        if layers is not None and not (len(layers) == 2 and 0 <= layers[0] < layers[1]):
            raise ValueError(f"experimental_layers: expected two layers, the first below the last, got {list(layers)}")
        check_temperature(self.temperature)
        if self.iterations < 1:
            raise ValueError(f"iterations: expected 1 or more, got {self.iterations}")


class AIM(VisualPruner):
    """Merges within each thumbnail, frame and crop; newline tokens fall away, as rows do."""

    name: ClassVar[str] = "aim"
    Options: ClassVar[type] = AIMOptions
    prunes_videos: ClassVar[bool] = True

    def __init__(self, options: AIMOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """What is left of every block."""
        if not self.options.merge_steps:
            return PrunePlan(layout.num_tokens, {"all": layout.num_tokens})
        view = merged_count(layout.side * layout.side, self.options.merge_steps)
        parts = {
            "thumbnail": layout.frames * view,
            "crops": sum(merged_count(n, self.options.merge_steps) for n in layout.crop_tokens),
        }
        return PrunePlan(sum(parts.values()), parts)

    def select(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> Tensor:
        """Places of the tokens into which others were merged, and of those that stayed by themselves."""
        return self._merged(layout, plan, picture)[1]

    def apply(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> Tensor:
        """Merged tokens."""
        return self._merged(layout, plan, picture)[0]

    def _merged(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> tuple[Tensor, Tensor]:
        tokens = picture.tokens
        if plan.num_tokens == layout.num_tokens:
            return tokens, torch.arange(len(tokens), device=tokens.device)
        parts = []
        for block in grids.view_token_indices(layout, tokens.device):
            merged, at = merge_tokens(tokens[block], self.options.merge_steps, self.options.order == "raster")
            parts.append((merged, block[at]))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def layer_schedule(self) -> LayerSchedule | None:
        """Part (b), if it was asked for."""
        if (layers := self.options.experimental_layers) is None:
            return None
        return LayerSchedule(layers[0], layers[1], self.options.temperature, self.options.iterations)


def merged_count(n: int, steps: int) -> int:
    """How many of ``n`` tokens `merge` leaves."""
    for _ in range(steps):
        n -= n // 2  # of what is left, so that more tokens never leave fewer
    return n


def merge_tokens(tokens: Tensor, steps: int, raster: bool) -> tuple[Tensor, Tensor]:
    """Merge tokens [n, width] in some steps; what is left, and at which places it stood."""
    at = torch.arange(len(tokens), device=tokens.device)
    for _ in range(steps):
        tokens, kept = merge_step(tokens, len(tokens) // 2, raster)
        at = at[kept]
    return tokens, at


def merge_step(tokens: Tensor, count: int, raster: bool) -> tuple[Tensor, Tensor]:
    """One step of bipartite merging of tokens [n, width] (section 3.2).

    The ``count`` tokens at even places that are most like one at an odd place are averaged into it, all that go to one
    place at once.

    Returns:
        [n - count, width] tokens, and the places at which they stood.
    """
    if count <= 0:
        return tokens, torch.arange(len(tokens), device=tokens.device)
    unit = functional.normalize(tokens.float(), dim=-1)
    best, target = (unit[::2] @ unit[1::2].T).max(-1)
    order = torch.sort(best, descending=True, stable=True).indices
    going, staying = order[:count], order[count:]
    into = target[going]
    odd = tokens[1::2].float()
    sums = odd.index_add(0, into, tokens[::2][going].float())
    members = torch.ones(len(odd), device=tokens.device).index_add_(0, into, torch.ones(count, device=tokens.device))
    merged = torch.cat([tokens[::2][staying], (sums / members[:, None]).to(tokens.dtype)])
    at = torch.cat([2 * staying, 2 * torch.arange(len(odd), device=tokens.device) + 1])
    if raster:
        place = at.argsort()
        merged, at = merged[place], at[place]
    return merged, at


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(AIM)
