"""Layout of visual tokens in models of the LLaVA family, from the size of an image."""

import math
from collections.abc import Callable
from typing import Any

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ....plugins.contracts import ImageLayout, Region

MOST_CROPS = 9  # LLaVA-OneVision pools grids that have more tokens than this number of views


def single_view(config: Any, height: int, width: int) -> ImageLayout:
    """Return the layout of LLaVA-1.5: one view for every image size."""
    del height, width
    return ImageLayout(_side(config))


def anyres_layout(config: Any, height: int, width: int) -> ImageLayout:
    """Return the layout of LLaVA-NeXT: a base view, and crops of the best-fitting resolution.

    Args:
        config: Hugging Face configuration of the model.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    side = _side(config)
    size = config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, size)
    region = _unpadded(height, width, rows * side, columns * side)
    grid = (region[1] - region[0], region[3] - region[2])
    return ImageLayout(side, (int(rows), int(columns)), region, grid, row_newlines=True)


def pooled_layout(config: Any, height: int, width: int) -> ImageLayout:
    """Return the layout of LLaVA-OneVision: that of LLaVA-NeXT, with large grids pooled."""
    layout = anyres_layout(config, height, width)
    ratio = math.sqrt(layout.grid_tokens / (MOST_CROPS * layout.side**2))
    if ratio <= 1.1:
        return layout
    grid = (int(layout.grid[0] // ratio), int(layout.grid[1] // ratio))
    return ImageLayout(layout.side, layout.crops, layout.crop_region, grid, row_newlines=True)


def video_layout(config: Any, count: int) -> ImageLayout:
    """Return the layout of a video in LLaVA-OneVision: each frame pooled to half its side, one newline after the last.

    Args:
        config: Hugging Face configuration of the model.
        count: Number of frames.
    """
    return ImageLayout(math.ceil(_side(config) / 2), last_newlines=1, frames=count)


Layout = Callable[[Any, int, int], ImageLayout]
BY_MODEL: dict[str, Layout] = {"llava": single_view, "llava_next": anyres_layout, "llava_onevision": pooled_layout}


def _side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _unpadded(height: int, width: int, rows: int, columns: int) -> Region:
    """Return the region of a grid that shows an image, which is resized with its aspect ratio and centred.

    Rounding is that of transformers' ``unpad_image``, from which vLLM computes the number of placeholder tokens.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        rows: Number of rows of the grid.
        columns: Number of columns of the grid.
    """
    if width / height > columns / rows:
        inner = int(round(height * (columns / width), 7))
        padding = (rows - inner) // 2
        return padding, rows - padding, 0, columns
    inner = int(round(width * (rows / height), 7))
    padding = (columns - inner) // 2
    return 0, rows, padding, columns - padding
