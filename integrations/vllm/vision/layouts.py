"""From the size of a picture to the tokens that a model of the LLaVA family makes of it."""

import math
from collections.abc import Callable
from typing import Any

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ....plugins.contracts import ImageLayout, Region

MOST_CROPS = 9  # of LLaVA-OneVision: grids of more tokens than so many views have are pooled


def single_view(config: Any, height: int, width: int) -> ImageLayout:
    """LLaVA-1.5: one view, whatever the size."""
    del height, width
    return ImageLayout(_side(config))


def anyres_layout(config: Any, height: int, width: int) -> ImageLayout:
    """LLaVA-NeXT: a thumbnail, and crops of the resolution that fits best."""
    side = _side(config)
    size = config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, size)
    box = _unpadded(height, width, rows * side, columns * side)
    grid = (box[1] - box[0], box[3] - box[2])
    return ImageLayout(side, (int(rows), int(columns)), box, grid, row_newlines=True)


def pooled_layout(config: Any, height: int, width: int) -> ImageLayout:
    """LLaVA-OneVision: the same, with large grids pooled."""
    whole = anyres_layout(config, height, width)
    ratio = math.sqrt(whole.grid_tokens / (MOST_CROPS * whole.side**2))
    if ratio <= 1.1:
        return whole
    grid = (int(whole.grid[0] // ratio), int(whole.grid[1] // ratio))
    return ImageLayout(whole.side, whole.crops, whole.crop_region, grid, row_newlines=True)


def video_layout(config: Any, count: int) -> ImageLayout:
    """A video of LLaVA-OneVision: each frame pooled to half its side, one newline behind the last."""
    return ImageLayout(math.ceil(_side(config) / 2), last_newlines=1, frames=count)


Layout = Callable[[Any, int, int], ImageLayout]
BY_MODEL: dict[str, Layout] = {"llava": single_view, "llava_next": anyres_layout, "llava_onevision": pooled_layout}


def _side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _unpadded(height: int, width: int, rows: int, columns: int) -> Region:
    """What of a grid shows a picture that was resized into it with its own proportions, in the middle.

    Rounding is that of transformers' ``unpad_image``, which vLLM announces too.
    """
    if width / height > columns / rows:
        inner = int(round(height * (columns / width), 7))
        padding = (rows - inner) // 2
        return padding, rows - padding, 0, columns
    inner = int(round(width * (rows / height), 7))
    padding = (columns - inner) // 2
    return 0, rows, padding, columns - padding
