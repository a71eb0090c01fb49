"""From views to the grid of a picture, and from places on it to places among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pilotfish._internal.lazy_import import functional, torch

from ..contracts import ImageLayout
from .token_budget import top_indices

if TYPE_CHECKING:
    from torch import Tensor


def stitch_crops(layout: ImageLayout, views: Tensor) -> Tensor:
    """The grid of a picture from its crops, without padding, pooled as the model pools it.

    Args:
        layout: Of the picture.
        views: [1 + crops, side * side, ...] what belongs to each patch, the thumbnail first; further views are ignored.

    Returns:
        [rows, columns, ...] of the grid.
    """
    (rows, columns), side, rest = layout.crops, layout.side, views.shape[2:]
    top, bottom, left, right = layout.crop_region
    crops = views[1 : 1 + rows * columns].reshape(rows, columns, side, side, *rest)
    whole = crops.transpose(1, 2).reshape(rows * side, columns * side, *rest)[top:bottom, left:right]
    return whole if tuple(whole.shape[:2]) == layout.grid else resize_grid(whole, layout.grid)


def resize_grid(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, as LLaVA resizes: [h, w, ...] to ``size``, in float32."""
    if 0 in size:
        return values.new_zeros(*size, *values.shape[2:], dtype=torch.float32)
    channels = values.float().flatten(2) if values.dim() > 2 else values.float()[..., None]
    resized = functional.interpolate(channels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(*size, *values.shape[2:])


def token_indices(layout: ImageLayout, first: Tensor, cells: Tensor) -> Tensor:
    """Places among a picture's tokens of what stays; newlines always do.

    Args:
        layout: Of the picture.
        first: Places of tokens before the grid that stay, in the order wanted.
        cells: [rows, columns] bool, of the grid.
    """
    if layout.row_newlines:
        cells = torch.cat([cells, cells.new_ones(layout.grid[0], 1)], 1)
    last = torch.arange(layout.num_tokens - layout.last_newlines, layout.num_tokens, device=first.device)
    return torch.cat([first, layout.base_tokens + cells.flatten().nonzero().flatten(), last])


def grid_values(layout: ImageLayout, values: Tensor) -> Tensor:
    """[rows, columns, ...] of the grid, without newlines, from what belongs to each of a picture's tokens."""
    height, width = layout.grid
    grid = values[layout.base_tokens : layout.num_tokens - layout.last_newlines]
    return grid.view(height, width + layout.row_newlines, *values.shape[1:])[:, :width]


def top_patches_per_crop(layout: ImageLayout, scores: Tensor, counts: Sequence[int]) -> Tensor:
    """[rows, columns] bool: of each crop as many cells as counted, those of the highest scores [rows, columns]."""
    keep = torch.zeros(layout.grid, dtype=torch.bool, device=scores.device)
    for (top, bottom, left, right), count in zip(layout.crop_regions, counts, strict=True):
        part = scores[top:bottom, left:right]
        chosen = torch.zeros(part.numel(), dtype=torch.bool, device=scores.device)
        chosen[top_indices(part.flatten(), count)] = True
        keep[top:bottom, left:right] = chosen.view(part.shape)
    return keep


def view_token_indices(layout: ImageLayout, device: torch.device) -> list[Tensor]:
    """Places of the tokens of each thumbnail or frame, then of each crop, row by row; newlines are in none."""
    per_view = layout.side * layout.side
    found = list(torch.arange(layout.base_tokens, device=device).split(per_view))
    height, width = layout.grid
    grid = torch.arange(height * (width + layout.row_newlines), device=device).view(height, width + layout.row_newlines)
    return found + [
        layout.base_tokens + grid[a:b, c:d].flatten() for a, b, c, d in layout.crop_regions if b > a and d > c
    ]
