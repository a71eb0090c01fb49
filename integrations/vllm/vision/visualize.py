"""What a pruner keeps of a picture, as a picture."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ....plugins.config import ConfigError, parse_assignments
from ....plugins.contracts import ImageLayout, Region, VisualPruner
from ....plugins.manager import plugins
from ....plugins.pruning import grids
from ..models import registry
from .image_encoder import VisionEncoder

DIM = 0.25  # brightness of what is dropped
THUMBNAIL = 0.4  # height of the thumbnail's drawing, of the picture's
MOST_PIXELS = 89_478_485  # beyond which Pillow suspects an attack


def visualize_pruning(pictures: list[Path], chosen: list[str] | None, model: str, out: Path | None) -> None:
    """See, select, draw, and print how many tokens there are.

    Raises:
        ConfigError: a picture, a pruner or the model cannot be used.
    """
    pruners = {text: _make(text) for text in chosen or sorted(plugins().classes("pruner"))}
    images = {path: _open(path) for path in pictures}
    eye = VisionEncoder(Path(registry.resolve_model(model)))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from None
    table = Table()
    for column in ("picture", "size", "pruner", "tokens", "kept", "share", "drawing"):
        table.add_column(column, overflow="fold")  # what is cut cannot be read
    for path, image in images.items():
        layout, seen, _ = eye.encode(image)
        for text, pruner in pruners.items():
            plan = pruner.plan(layout)
            kept = torch.zeros(layout.num_tokens, dtype=torch.bool)
            kept[pruner.select(layout, plan, seen)] = True
            drawing = None
            if out is not None:
                drawing = out / f"{path.stem}-{''.join(c if c.isalnum() else '-' for c in text)}.png"
                draw_overlay(image, layout, kept).save(drawing)
            size, share = f"{image.width} x {image.height}", f"{plan.num_tokens / layout.num_tokens:.1%}"
            row = (path.name, size, text, str(layout.num_tokens), str(plan.num_tokens), share, str(drawing or ""))
            table.add_row(*row)
    Console().print(table)


def draw_overlay(image: Any, layout: ImageLayout, kept: Any) -> Any:
    """A drawing of a PIL picture; ``kept`` is [layout.num_tokens] bool."""
    from PIL import Image, ImageDraw

    side = layout.side
    small = max(round(image.height * THUMBNAIL), side)
    thumbnail = _dimmed(image.resize((small, small)), kept[: side * side].view(side, side))
    if not layout.grid_tokens:
        return thumbnail
    height, width = layout.grid
    grid = grids.grid_values(layout, kept)
    whole = _dimmed(image, grid)
    pen = ImageDraw.Draw(whole)
    for box in layout.crop_regions:
        _label(pen, box, grid, image.width / width, image.height / height)
    canvas = Image.new("RGB", (whole.width + thumbnail.width + 8, max(whole.height, thumbnail.height)), "white")
    canvas.paste(thumbnail, (0, 0))
    canvas.paste(whole, (thumbnail.width + 8, 0))
    return canvas


def _dimmed(image: Any, kept: Any) -> Any:
    """The picture with the cells that are not kept, [rows, columns] bool, darkened."""
    from PIL import Image, ImageEnhance

    mask = Image.fromarray((kept.numpy() * 255).astype("uint8")).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, ImageEnhance.Brightness(image).enhance(DIM), mask)


def _label(pen: Any, box: Region, kept: Any, across: float, down: float) -> None:
    top, bottom, left, right = box
    if bottom > top and right > left:
        share = float(kept[top:bottom, left:right].float().mean())
        corner = (left * across, top * down)
        far = max(right * across - 1, corner[0]), max(bottom * down - 1, corner[1])
        pen.rectangle((*corner, *far), outline="red")
        pen.text((corner[0] + 3, corner[1] + 2), f"{share:.0%}", fill="white", stroke_width=2, stroke_fill="black")


def _make(text: str) -> VisualPruner:
    cls, options = plugins().resolve("pruner", parse_assignments(text))
    return cls(options)


def _open(path: Path) -> Any:
    """A picture as RGB, its first frame where it has several; what is transparent becomes white."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ConfigError(f"{path}: {file.width} x {file.height} pixels are too many")
            if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
                clear = file.convert("RGBA")
                white = Image.new("RGBA", clear.size, "white")
                return Image.alpha_composite(white, clear).convert("RGB")
            return file.convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"{path}: not a picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
