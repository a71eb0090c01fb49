"""Visualisation of pruning: an image in which pruned patches are darkened."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from ....plugins.config import ConfigError, parse_assignments
from ....plugins.contracts import ImageLayout, Region, VisualPruner
from ....plugins.manager import plugins
from ....plugins.pruning import grids
from ....plugins.terminal import make_table, print_plain
from ..models import registry
from .image_encoder import VisionEncoder

DIM = 0.25  # brightness of pruned patches
THUMBNAIL = 0.4  # height of the base view, relative to the image
MOST_PIXELS = 89_478_485  # above this, Pillow warns of a decompression bomb


def visualize_pruning(pictures: list[Path], chosen: list[str] | None, model: str, out: Path | None) -> None:
    """Print the number of visual tokens of images before and after pruning, and draw the kept patches.

    Args:
        pictures: Image files.
        chosen: Pruners as ``name,option=value,...``; all registered pruners if empty.
        model: Name of an embedded model, or folder of a LLaVA checkpoint.
        out: Folder for the drawings; None for no drawings.

    Raises:
        ConfigError: An image, a pruner, the model or the folder cannot be used.
    """
    pruners = {text: _make(text) for text in chosen or sorted(plugins().classes("pruner"))}
    images = {path: _open(path) for path in pictures}
    encoder = VisionEncoder(Path(registry.resolve_model(model)))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from None
    drawings: dict[Path, int] = {}
    for path, image in images.items():
        layout, features, _ = encoder.encode(image)
        title = f"{path.name}: {image.width} x {image.height} pixels, {layout.num_tokens} visual tokens"
        headers = ("pruner", "kept", "share", *(["drawing"] if out else []))
        table = make_table(*headers, numbers=("kept", "share"), title=title)
        for text, pruner in pruners.items():
            plan = pruner.plan(layout)
            mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
            mask[pruner.select(layout, plan, features)] = True
            row = [text, str(plan.num_tokens), f"{plan.num_tokens / layout.num_tokens:.1%}"]
            if out is not None:
                drawing = out / f"{path.stem}-{''.join(c if c.isalnum() else '-' for c in text)}.png"
                drawings[drawing] = drawings.get(drawing, 0) + 1
                if drawings[drawing] > 1:  # images of two folders can have the same name
                    drawing = drawing.with_stem(f"{drawing.stem}-{drawings[drawing]}")
                draw_overlay(image, layout, mask).save(drawing)
                row.append(drawing.name)
            table.add_row(*row)
        print_plain(table)
    if out is not None:
        print_plain(f"drawings written to {out}")


def draw_overlay(image: Any, layout: ImageLayout, kept: Any) -> Any:
    """Draw an image with its pruned patches darkened: the base view and, if there are crops, the grid.

    Args:
        image: PIL image in RGB.
        layout: Layout of its visual tokens.
        kept: [layout.num_tokens] bool mask of the kept tokens.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw

    side = layout.side
    small = max(round(image.height * THUMBNAIL), side)
    base_view = _dimmed(image.resize((small, small)), kept[: side * side].view(side, side))
    if not layout.grid_tokens:
        return base_view
    height, width = layout.grid
    grid = grids.grid_values(layout, kept)
    crops = _dimmed(image, grid)
    pen = ImageDraw.Draw(crops)
    for region in layout.crop_regions:
        _label(pen, region, grid, image.width / width, image.height / height)
    canvas = Image.new("RGB", (crops.width + base_view.width + 8, max(crops.height, base_view.height)), "white")
    canvas.paste(base_view, (0, 0))
    canvas.paste(crops, (base_view.width + 8, 0))
    return canvas


def _dimmed(image: Any, kept: Any) -> Any:
    """Darken the patches of an image that are not in ``kept``, a [rows, columns] bool mask."""
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
    """Read an image as RGB, as vLLM does: turned by its EXIF orientation, transparent pixels white.

    Only the first frame is read. Values above 255 of images with 16 bits per channel are clipped.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ConfigError(f"{path}: {opened.width} x {opened.height} pixels, more than {MOST_PIXELS}")
            if opened.mode.startswith(("I", "F")):
                sys.stderr.write(f"{path}: more than 8 bits per channel; values above 255 are clipped, as in vLLM\n")
            file = opened
            with contextlib.suppress(Exception):  # like vLLM's normalize_image: damaged EXIF data are ignored
                file = ImageOps.exif_transpose(opened)
            if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
                clear = file.convert("RGBA")
                white = Image.new("RGBA", clear.size, "white")
                return Image.alpha_composite(white, clear).convert("RGB")
            return file.convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"{path}: not an image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
