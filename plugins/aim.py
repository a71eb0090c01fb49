"""AIM: adaptive inference by token merging and pruning (arXiv 2412.03248).

    (a) merging, before the language model (section 3.2): repeat ``merge_steps`` times in each view or frame
        tokens at even positions are sources, tokens at odd positions are destinations
        the half of all tokens that are sources most similar to a destination (cosine) is averaged into it
    (b) pruning, inside the language model (section 3.3): after layer l, l1 <= l < l2, the share of visual tokens that
        remain is 1 - (l - l1 + 1) / (l2 - l1), those of highest importance by page rank over the layer's attention

Part (a) saves about nine tenths of what both parts save. Part (b) is experimental (``experimental_layers``): it
recomputes attention metadata for each layer, needs whole prompts, and frees no memory. Its page rank is in
``pruning/importance.py``, its attachment in ``integrations/vllm/vision/layer_pruning.py``. Newline tokens are dropped,
since merged tokens no longer form rows. The published code emits unmerged tokens first (``order=published``).
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
    """Options of AIM.

    Attributes:
        merge_steps: Number of merging steps, each of which removes about half of the tokens; two steps keep a quarter.
        order: Order of the remaining tokens: ``raster``, or ``published`` for unmerged tokens first.
        experimental_layers: Layers between which visual tokens are pruned inside the language model, as [l1, l2] =
            [14, 22]; None for no pruning.
        temperature: Temperature of the attention on which the importance is computed.
        iterations: Number of page rank iterations.
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
    """Merges similar visual tokens, in each view or frame."""

    name: ClassVar[str] = "aim"
    Options: ClassVar[type] = AIMOptions
    prunes_videos: ClassVar[bool] = True

    def __init__(self, options: AIMOptions) -> None:
        self.options = options

    def plan(self, layout: ImageLayout) -> PrunePlan:
        """Plan the number of tokens that merging leaves of every view."""
        if not self.options.merge_steps:
            return PrunePlan(layout.num_tokens, {"all": layout.num_tokens})
        per_view = merged_count(layout.side * layout.side, self.options.merge_steps)
        parts = {
            "base_view": layout.frames * per_view,
            "crops": sum(merged_count(n, self.options.merge_steps) for n in layout.crop_tokens),
        }
        return PrunePlan(sum(parts.values()), parts)

    def select(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> Tensor:
        """Return the indices of the tokens that remain, merged or not; see the base class."""
        return self._merge(layout, plan, features)[1]

    def apply(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> Tensor:
        """Return the merged tokens; see the base class."""
        return self._merge(layout, plan, features)[0]

    def layer_schedule(self) -> LayerSchedule | None:
        """Return the schedule of part (b), where ``experimental_layers`` asks for it."""
        layers = self.options.experimental_layers
        if layers is None:
            return None
        return LayerSchedule(layers[0], layers[1], self.options.temperature, self.options.iterations)

    def _merge(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        tokens = features.tokens
        if plan.num_tokens == layout.num_tokens:
            return tokens, torch.arange(len(tokens), device=tokens.device)
        parts = []
        for view in grids.view_token_indices(layout, tokens.device):
            merged, at = merge_tokens(tokens[view], self.options.merge_steps, self.options.order == "raster")
            parts.append((merged, view[at]))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def merged_count(n: int, steps: int) -> int:
    """Return how many of ``n`` tokens `merge_tokens` leaves."""
    for _ in range(steps):
        n -= n // 2  # half of what is left, so that more tokens never leave fewer
    return n


def merge_tokens(tokens: Tensor, steps: int, raster: bool) -> tuple[Tensor, Tensor]:
    """Merge the tokens of one view in several steps (section 3.2).

    Args:
        tokens: [n, width].
        steps: Number of merging steps.
        raster: Whether the remaining tokens keep their order.

    Returns:
        The remaining tokens [m, width], and their indices in ``tokens`` [m].
    """
    at = torch.arange(len(tokens), device=tokens.device)
    for _ in range(steps):
        tokens, remaining = merge_step(tokens, len(tokens) // 2, raster)
        at = at[remaining]
    return tokens, at


def merge_step(tokens: Tensor, count: int, raster: bool) -> tuple[Tensor, Tensor]:
    """Merge ``count`` tokens into others: one step of bipartite merging (section 3.2).

    Args:
        tokens: [n, width].
        count: Number of tokens to merge, at most n // 2.
        raster: Whether the remaining tokens keep their order; otherwise unmerged sources come first.

    Returns:
        The remaining tokens [n - count, width], and their indices in ``tokens``.
    """
    if count <= 0:
        return tokens, torch.arange(len(tokens), device=tokens.device)
    sources = tokens[::2]
    destinations = tokens[1::2].float()
    # Cosine similarity of every source with its most similar destination.
    unit = functional.normalize(tokens.float(), dim=-1)
    similarity, destination = (unit[::2] @ unit[1::2].T).max(-1)
    order = torch.sort(similarity, descending=True, stable=True).indices
    merged_sources = order[:count]
    unmerged_sources = order[count:]
    # Average each destination with all sources that go to it, unweighted.
    into = destination[merged_sources]
    sums = destinations.index_add(0, into, sources[merged_sources].float())
    ones = torch.ones(count, device=tokens.device)
    members = torch.ones(len(destinations), device=tokens.device).index_add_(0, into, ones)
    averages = (sums / members[:, None]).to(tokens.dtype)
    remaining = torch.cat([sources[unmerged_sources], averages])
    destination_indices = 2 * torch.arange(len(destinations), device=tokens.device) + 1
    at = torch.cat([2 * unmerged_sources, destination_indices])
    if raster:
        by_index = at.argsort()
        remaining = remaining[by_index]
        at = at[by_index]
    return remaining, at


@hookimpl
def register_pruners(register) -> None:
    """Register the pruner."""
    register(AIM)
