"""The contract of visual pruners: how many visual tokens an image gets, and which.

The number is announced before the vision encoder runs, since the engine reserves that many placeholder tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

Region = tuple[int, int, int, int]  # first row, end row, first column, end column


@dataclass(frozen=True)
class ImageLayout:
    """Layout of the visual tokens of an image, known from its size alone.

    A model sees an image as a small base view (thumbnail) and, with AnyRes processing, as crops whose tokens form one
    grid. Tokens are in raster order: those of the base view, then those of the grid, each row of which may end with a
    newline token. A video has frames instead of the base view, and no crops.

    Attributes:
        side: Number of tokens along each side of a view.
        crops: Number of rows and columns of crops; (0, 0) where there are none.
        crop_region: Part of the crops' grid that shows the image, in tokens; the rest is padding, which has no tokens.
        grid: Number of rows and columns of tokens to which the model pools that region; those of the region where it
            does not pool.
        row_newlines: Whether a newline token ends each row of the grid.
        last_newlines: Number of newline tokens after all others.
        frames: Number of views before the grid: 1, or the frames of a video.
    """

    side: int
    crops: tuple[int, int] = (0, 0)
    crop_region: Region = (0, 0, 0, 0)
    grid: tuple[int, int] = (0, 0)
    row_newlines: bool = False
    last_newlines: int = 0
    frames: int = 1

    @property
    def base_tokens(self) -> int:
        """Number of tokens before the grid."""
        return self.frames * self.side * self.side

    @property
    def grid_tokens(self) -> int:
        """Number of tokens of the grid, without newlines."""
        return self.grid[0] * self.grid[1]

    @property
    def num_newlines(self) -> int:
        """Number of newline tokens."""
        return self.grid[0] * self.row_newlines + self.last_newlines

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens of the image when none is pruned."""
        return self.base_tokens + self.grid_tokens + self.num_newlines

    @cached_property
    def crop_regions(self) -> tuple[Region, ...]:
        """Region of the grid that each crop shows, in raster order; empty for a crop of padding only."""
        (rows, columns), (top, bottom, left, right), (height, width) = self.crops, self.crop_region, self.grid

        def cut(parts: int, first: int, last: int, length: int) -> list[tuple[int, int]]:
            edges = [min(max(i * self.side, first), last) - first for i in range(parts + 1)]
            scaled = [round(e * length / (last - first)) if last > first else 0 for e in edges]
            return list(pairwise(scaled))

        across = cut(columns, left, right, width)
        return tuple((a, b, c, d) for a, b in cut(rows, top, bottom, height) for c, d in across)

    @property
    def crop_tokens(self) -> list[int]:
        """Number of tokens in each of `crop_regions`."""
        return [(bottom - top) * (right - left) for top, bottom, left, right in self.crop_regions]


@dataclass(frozen=True)
class PrunePlan:
    """Number of tokens that an image gets; the engine reserves that many placeholder tokens.

    Attributes:
        num_tokens: Number of all tokens.
        parts: The number by origin, under the pruner's names.
    """

    num_tokens: int
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFeatures:
    """Output of the vision encoder and projector for an image.

    Attributes:
        tokens: [layout.num_tokens, width] input embeddings of the language model, before pruning.
        scores: [views, side * side] importance of each patch within its view, the base view first; None for a pruner
            without `VisualPruner.needs_scores`.
    """

    tokens: "Tensor"
    scores: "Tensor | None" = None


class VisualPruner(Plugin, ABC):
    """Base class of visual pruners, which drop or merge visual tokens.

    Which tokens may depend on the image; how many may depend on its layout only.
    """

    needs_scores: ClassVar[bool] = False  # whether `ImageFeatures.scores` are computed, at some cost
    prunes_videos: ClassVar[bool] = False  # whether video frames are pruned too

    @abstractmethod
    def __init__(self, options: Any) -> None: ...

    @abstractmethod
    def plan(self, layout: ImageLayout) -> PrunePlan:
        """Return the number of tokens for an image of this layout."""

    @abstractmethod
    def select(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> "Tensor":
        """Return the indices in ``features.tokens`` of the tokens that stay, [plan.num_tokens], in output order."""

    def apply(self, layout: ImageLayout, plan: PrunePlan, features: ImageFeatures) -> "Tensor":
        """Return the tokens that the language model gets, [plan.num_tokens, width]."""
        return features.tokens[self.select(layout, plan, features)]

    def layer_schedule(self) -> "LayerSchedule | None":
        """Return how visual tokens are pruned inside the language model; None for not at all."""
        return None


@dataclass(frozen=True)
class LayerSchedule:
    """Pruning of visual tokens layer by layer inside the language model (AIM, arXiv 2412.03248, section 3.3).

    Attributes:
        first: Layer after which the first tokens are pruned.
        last: First layer without visual tokens.
        temperature: Temperature of the softmax over which the page rank runs.
        iterations: Number of page rank iterations.
    """

    first: int
    last: int
    temperature: float
    iterations: int

    def kept_share(self, layer: int) -> float:
        """Return the share of the visual tokens that remain after a layer."""
        return 1.0 if layer < self.first else max(0.0, 1 - (layer - self.first + 1) / (self.last - self.first))
