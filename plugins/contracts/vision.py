"""Visual pruners: fewer tokens for a picture, as many as were announced before it was looked at."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

Region = tuple[int, int, int, int]  # first row, row behind the last, first column, column behind the last


@dataclass(frozen=True)
class ImageLayout:
    """Where the visual tokens of a picture come from, known from its size alone.

    A model sees a picture as a small thumbnail and, if it cuts pictures, as crops whose tokens form one grid. Tokens
    stand row by row: those of the thumbnail, then those of the grid, each row of which may end with a newline token. A
    video has frames in place of the thumbnail, and no crops.

    Attributes:
        side: Tokens along each side of a view.
        crops: Rows and columns of crops; (0, 0) where there are none.
        crop_region: What of the crops' grid shows the picture, in tokens; the rest is padding, of which the model gets nothing.
        grid: Rows and columns of tokens to which the model pools that box; those of the box where it does not.
        row_newlines: Whether a newline token ends each row of the grid.
        last_newlines: Newline tokens behind all others.
        frames: How many views come before the grid: 1, or the frames of a video.
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
        """Tokens before the grid."""
        return self.frames * self.side * self.side

    @property
    def grid_tokens(self) -> int:
        """Tokens of the grid, without newlines."""
        return self.grid[0] * self.grid[1]

    @property
    def num_newlines(self) -> int:
        """Newline tokens."""
        return self.grid[0] * self.row_newlines + self.last_newlines

    @property
    def num_tokens(self) -> int:
        """All tokens that the model takes of the picture when none is dropped."""
        return self.base_tokens + self.grid_tokens + self.num_newlines

    @cached_property
    def crop_regions(self) -> tuple[Region, ...]:
        """The part of the grid that each crop shows, crops row by row; empty for a crop of nothing but padding."""
        (rows, columns), (top, bottom, left, right), (height, width) = self.crops, self.crop_region, self.grid

        def cut(parts: int, first: int, last: int, length: int) -> list[tuple[int, int]]:
            edges = [min(max(i * self.side, first), last) - first for i in range(parts + 1)]
            scaled = [round(e * length / (last - first)) if last > first else 0 for e in edges]
            return list(pairwise(scaled))

        across = cut(columns, left, right, width)
        return tuple((a, b, c, d) for a, b in cut(rows, top, bottom, height) for c, d in across)

    @property
    def crop_tokens(self) -> list[int]:
        """Tokens in each of `rectangles`."""
        return [(bottom - top) * (right - left) for top, bottom, left, right in self.crop_regions]


@dataclass(frozen=True)
class PrunePlan:
    """How many tokens a picture gets: the engine makes room for exactly so many.

    Attributes:
        num_tokens: All of them.
        parts: The same by origin, as the pruner names it.
    """

    num_tokens: int
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFeatures:
    """What the tower made of a picture.

    Attributes:
        tokens: [layout.num_tokens, width] what the language model would be given.
        scores: [views, side * side] how much each patch matters to its view, the thumbnail first; None for a pruner
            that is not `scored`.
    """

    tokens: "Tensor"
    scores: "Tensor | None" = None


class VisualPruner(Plugin, ABC):
    """Drops or merges visual tokens. Which may depend on the picture, how many may not."""

    needs_scores: ClassVar[bool] = False  # whether it wants `Picture.scores`, which cost the tower something
    prunes_videos: ClassVar[bool] = False  # whether it takes the frames of videos too; they stay whole otherwise

    @abstractmethod
    def __init__(self, options: Any) -> None: ...

    @abstractmethod
    def plan(self, layout: ImageLayout) -> PrunePlan:
        """How many tokens a picture of this layout gets."""

    @abstractmethod
    def select(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> "Tensor":
        """[plan.num_tokens] places in `Picture.tokens` of those that stay, in the order in which they are given."""

    def apply(self, layout: ImageLayout, plan: PrunePlan, picture: ImageFeatures) -> "Tensor":
        """[plan.num_tokens, width] what the language model is given."""
        return picture.tokens[self.select(layout, plan, picture)]

    def layer_schedule(self) -> "LayerSchedule | None":
        """Which visual tokens leave inside the language model; none where that is None."""
        return None


@dataclass(frozen=True)
class LayerSchedule:
    """Visual tokens leave a prompt one layer after the other (AIM, arXiv 2412.03248, section 3.3).

    Attributes:
        first: The layer after which the first of them leave.
        last: From this layer on there are none.
        temperature: Of the softmax whose page rank tells what matters.
        iterations: Of the page rank.
    """

    first: int
    last: int
    temperature: float
    iterations: int

    def kept_share(self, layer: int) -> float:
        """Share of the visual tokens that is left after a layer."""
        return 1.0 if layer < self.first else max(0.0, 1 - (layer - self.first + 1) / (self.last - self.first))
