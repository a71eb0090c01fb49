"""Conversions between the views of an image, its token grid, and indices of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pilotfish._internal.lazy_import import functional, torch

from ..contracts import ImageLayout
from .token_budget import top_indices

if TYPE_CHECKING:
    from torch import Tensor


def stitch_crops(layout: ImageLayout, views: Tensor) -> Tensor:
    """Stitch per-crop values into the grid of an image, without padding, pooled as the model pools it.

    Args:
        layout: Layout of the image.
        views: [1 + crops, side * side, ...] values of each patch, the base view first; further views are ignored.

    Returns:
        [rows, columns, ...] values of the grid.
    """
    (rows, columns), side, rest = layout.crops, layout.side, views.shape[2:]
    top, bottom, left, right = layout.crop_region
    crops = views[1 : 1 + rows * columns].reshape(rows, columns, side, side, *rest)
    grid = crops.transpose(1, 2).reshape(rows * side, columns * side, *rest)[top:bottom, left:right]
    return grid if tuple(grid.shape[:2]) == layout.grid else resize_grid(grid, layout.grid)


def resize_grid(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [h, w, ...] to ``size`` bilinearly, as LLaVA does, in float32."""
    if 0 in size:
        return values.new_zeros(*size, *values.shape[2:], dtype=torch.float32)
    channels = values.float().flatten(2) if values.dim() > 2 else values.float()[..., None]
    resized = functional.interpolate(channels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(*size, *values.shape[2:])


def token_indices(layout: ImageLayout, first: Tensor, mask: Tensor) -> Tensor:
    """Return the token indices of what is kept: tokens before the grid, tokens of the grid, and all newlines.

    Args:
        layout: Layout of the image.
        first: [kept] int64 indices of the kept tokens before the grid, in output order.
        mask: [rows, columns] bool mask of the kept tokens of the grid.
    """
    if layout.row_newlines:
        mask = torch.cat([mask, mask.new_ones(layout.grid[0], 1)], 1)
    last = torch.arange(layout.num_tokens - layout.last_newlines, layout.num_tokens, device=first.device)
    return torch.cat([first, layout.base_tokens + mask.flatten().nonzero().flatten(), last])


def grid_values(layout: ImageLayout, values: Tensor) -> Tensor:
    """Return the grid's values [rows, columns, ...], without newlines, from values of each token of an image."""
    height, width = layout.grid
    grid = values[layout.base_tokens : layout.num_tokens - layout.last_newlines]
    return grid.view(height, width + layout.row_newlines, *values.shape[1:])[:, :width]


def top_patches_per_crop(layout: ImageLayout, scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Return a [rows, columns] bool mask of the ``counts`` patches of highest [rows, columns] score in each crop."""
    keep = torch.zeros(layout.grid, dtype=torch.bool, device=scores.device)
    for (top, bottom, left, right), count in zip(layout.crop_regions, counts, strict=True):
        part = scores[top:bottom, left:right]
        selected = torch.zeros(part.numel(), dtype=torch.bool, device=scores.device)
        selected[top_indices(part.flatten(), count)] = True
        keep[top:bottom, left:right] = selected.view(part.shape)
    return keep


def view_token_indices(layout: ImageLayout, device: torch.device) -> list[Tensor]:
    """Return the token indices of the base view or of each frame, then of each crop; without newlines."""
    per_view = layout.side * layout.side
    views = list(torch.arange(layout.base_tokens, device=device).split(per_view))
    height, width = layout.grid
    grid = torch.arange(height * (width + layout.row_newlines), device=device).view(height, width + layout.row_newlines)
    return views + [
        layout.base_tokens + grid[a:b, c:d].flatten() for a, b, c, d in layout.crop_regions if b > a and d > c
    ]
