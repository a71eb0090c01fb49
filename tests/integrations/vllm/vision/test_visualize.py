"""Tests of how `pilotfish prune` reads images: as vLLM does."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")
from PIL import Image

from pilotfish.integrations.vllm.vision.visualize import _open


def as_vllm(path: Path) -> Image.Image:
    """Read an image with vLLM's functions."""
    from vllm.multimodal.image import convert_image_mode, normalize_image

    return convert_image_mode(normalize_image(Image.open(path)), "RGB")


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 99])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(path, exif=exif)
    image = _open(path)
    assert image.size == ((8, 12) if 5 <= orientation <= 8 else (12, 8))
    assert np.array_equal(np.asarray(image), np.asarray(as_vllm(path)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I", "I;16", "F"])
def test_modes_are_converted_as_in_vllm(tmp_path: Path, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 255, (8, 12, 4), np.uint8)
    if mode in ("I", "I;16", "F"):
        wide = values[..., 0].astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]) * 200
        source = Image.fromarray(wide)
    else:
        source = Image.fromarray(values, "RGBA").convert(mode)
    path = tmp_path / "a.tiff"
    source.save(path)
    assert np.abs(np.asarray(_open(path), np.int16) - np.asarray(as_vllm(path), np.int16)).max() <= 1
