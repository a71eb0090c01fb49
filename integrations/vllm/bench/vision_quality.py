"""Offline quality of the kept visual tokens: retention of a pasted needle, coverage of all features, kept saliency.

No text is generated, since the test models were not trained on images. Coverage and needle retention pull in opposite
directions.
"""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ....plugins.contracts import ImageFeatures, ImageLayout, VisualPruner
from ....plugins.diversity import Diversity, DiversityOptions
from ....plugins.globalcom2 import GlobalCom2, GlobalCom2Options
from ....plugins.pruning import grids
from ....plugins.pruning.token_budget import allocate_tokens, top_indices
from ...bench.record import Record
from ..models import vision_test_models
from ..serving.progress import counting_bar
from ..vision.image_encoder import VisionEncoder

RETAINS = (0.25, 0.10)
NEEDLE = "chelsea.png"
NEEDLE_BOX = (100, 40, 290, 230)  # the cat's face
SIZE = 0.16  # side of a needle, as a share of the image's shorter side
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def measure_retention(folder: Path, places: tuple[Path, ...]) -> list[Record]:
    """Measure needle recall, coverage and kept saliency of all selection methods, with standard errors over images."""
    from PIL import Image

    paths = sorted(p for place in places for p in place.rglob("*") if p.suffix.lower() in ENDINGS)
    needle = Image.open(next(p for p in paths if p.name == NEEDLE)).convert("RGB").crop(NEEDLE_BOX)
    encoder, saliency, results = VisionEncoder(folder), Saliency(), {}
    generator = random.Random(0)
    with counting_bar() as bar:
        for path in bar.track([p for p in paths if p.name != NEEDLE], description="needles"):
            image = Image.open(path).convert("RGB")
            width, height = image.size
            size = max(24, int(min(width, height) * SIZE))
            left, top = generator.randint(0, max(0, width - size)), generator.randint(0, max(0, height - size))
            image.paste(needle.resize((size, size)), (left, top))
            layout, image_features, features = encoder.encode(image)
            inside = _cells((left, top, left + size, top + size), image.size, layout.grid)
            if not layout.grid_tokens or not inside.any():
                continue
            unit = functional.normalize(grids.stitch_crops(layout, features).flatten(0, 1), dim=-1)
            saliency_map = saliency.of(image, layout.grid).flatten()
            for retain in RETAINS:
                for name, choose in selection_methods(retain).items():
                    mask = choose(layout, image_features).flatten()
                    values = {
                        "needle_recall": float((mask & inside.flatten()).sum() / inside.sum()),
                        "coverage": float((unit @ unit[mask].T).max(1).values.mean()),
                        "saliency_kept": float(saliency_map[mask].sum() / saliency_map.sum()),
                    }
                    for metric, value in values.items():
                        results.setdefault((name, retain, metric), []).append(value)
    return [
        Record(
            "vision",
            "images",
            f"{name}@retain={retain}",
            metric,
            round(statistics.mean(values), 4),
            "",
            [round(v, 4) for v in values],
            {"standard_error": round(statistics.stdev(values) / len(values) ** 0.5, 4), "images": len(values)},
        )
        for (name, retain, metric), values in results.items()
    ]


def selection_methods(retain: float) -> dict[str, Callable[[ImageLayout, ImageFeatures], Tensor]]:
    """Return selection methods of equal budget: from layout and features to a mask of the grid, [rows, columns]."""

    def by_plugin(pruner: VisualPruner) -> Callable[[ImageLayout, ImageFeatures], Tensor]:
        def choose(layout: ImageLayout, features: ImageFeatures) -> Tensor:
            mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
            mask[pruner.select(layout, pruner.plan(layout), features)] = True
            return grids.grid_values(layout, mask)

        return choose

    def at_random(layout: ImageLayout, features: ImageFeatures) -> Tensor:
        values = torch.rand(layout.grid_tokens, generator=torch.Generator().manual_seed(layout.grid_tokens))
        mask = torch.zeros(layout.grid_tokens, dtype=torch.bool)
        mask[top_indices(values, int(layout.grid_tokens * retain))] = True
        return mask.view(layout.grid)

    def uniform(layout: ImageLayout, features: ImageFeatures) -> Tensor:
        count = int(layout.grid_tokens * retain)
        mask = torch.zeros(layout.grid_tokens, dtype=torch.bool)
        mask[(torch.arange(count) * layout.grid_tokens / count).long()] = True
        return mask.view(layout.grid)

    def per_crop(layout: ImageLayout, features: ImageFeatures) -> Tensor:
        assert features.scores is not None
        counts = allocate_tokens(
            layout.crop_tokens, [n * retain for n in layout.crop_tokens], int(layout.grid_tokens * retain)
        )
        return grids.top_patches_per_crop(layout, grids.stitch_crops(layout, features.scores), counts)

    return {
        "random": at_random,
        "uniform": uniform,
        "per_crop": per_crop,
        "globalcom2": by_plugin(GlobalCom2(GlobalCom2Options(retain))),
        "diversity": by_plugin(Diversity(DiversityOptions(retain))),
        "diversity@method=determinantal": by_plugin(Diversity(DiversityOptions(retain, "determinantal"))),
    }


def _cells(box: tuple[int, int, int, int], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the mask of the patches of a grid whose centre lies in a box of the image, [rows, columns]."""
    (left, top, right, bottom), (width, height), (rows, columns) = box, size, grid
    y, x = (torch.arange(rows) + 0.5) * height / max(rows, 1), (torch.arange(columns) + 0.5) * width / max(columns, 1)
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]


class Saliency:
    """Saliency map of an image, by the network from which the test models' vision tower was taken."""

    def __init__(self) -> None:
        import onnxruntime

        self._session: Any = onnxruntime.InferenceSession(
            str(vision_test_models.vit_source()), providers=["CPUExecutionProvider"]
        )

    def of(self, image: Any, grid: tuple[int, int]) -> Tensor:
        """Return the saliency of each patch of a grid, [rows, columns]."""
        pixels = np.asarray(image.resize((224, 224)), np.float32).transpose(2, 0, 1) / 255
        mean, deviation = (
            np.array(v, np.float32)[:, None, None] for v in (vision_test_models.MEAN, vision_test_models.DEVIATION)
        )
        (importance,) = self._session.run(["output_importance"], {"input_image": ((pixels - mean) / deviation)[None]})
        return grids.resize_grid(torch.from_numpy(importance).reshape(importance.shape[-2:]), grid)
