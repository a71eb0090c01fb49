"""What can be said offline of kept tokens: how much of a pasted needle, of all that is seen, of what stands out.

No words are asked for: the test models were not trained to see. Coverage and recall pull in opposite directions.
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
SIZE = 0.16  # of a needle, of the picture's shorter side
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def measure_retention(folder: Path, places: tuple[Path, ...]) -> list[Record]:
    """Needle recall, coverage and kept saliency of every way to choose, with standard errors over pictures."""
    from PIL import Image

    paths = sorted(p for place in places for p in place.rglob("*") if p.suffix.lower() in ENDINGS)
    needle = Image.open(next(p for p in paths if p.name == NEEDLE)).convert("RGB").crop(NEEDLE_BOX)
    eye, saliency, found = VisionEncoder(folder), Saliency(), {}
    generator = random.Random(0)
    with counting_bar() as bar:
        for path in bar.track([p for p in paths if p.name != NEEDLE], description="needles"):
            image = Image.open(path).convert("RGB")
            width, height = image.size
            size = max(24, int(min(width, height) * SIZE))
            left, top = generator.randint(0, max(0, width - size)), generator.randint(0, max(0, height - size))
            image.paste(needle.resize((size, size)), (left, top))
            layout, picture, features = eye.encode(image)
            inside = _cells((left, top, left + size, top + size), image.size, layout.grid)
            if not layout.grid_tokens or not inside.any():
                continue
            unit = functional.normalize(grids.stitch_crops(layout, features).flatten(0, 1), dim=-1)
            stands_out = saliency.of(image, layout.grid).flatten()
            for retain in RETAINS:
                for name, choose in selection_methods(retain).items():
                    kept = choose(layout, picture).flatten()
                    values = {
                        "needle_recall": float((kept & inside.flatten()).sum() / inside.sum()),
                        "coverage": float((unit @ unit[kept].T).max(1).values.mean()),
                        "saliency_kept": float(stands_out[kept].sum() / stands_out.sum()),
                    }
                    for metric, value in values.items():
                        found.setdefault((name, retain, metric), []).append(value)
    return [
        Record(
            "vision",
            "pictures",
            f"{name}@retain={retain}",
            metric,
            round(statistics.mean(values), 4),
            "",
            [round(v, 4) for v in values],
            {"standard_error": round(statistics.stdev(values) / len(values) ** 0.5, 4), "pictures": len(values)},
        )
        for (name, retain, metric), values in found.items()
    ]


def selection_methods(retain: float) -> dict[str, Callable[[ImageLayout, ImageFeatures], Tensor]]:
    """Ways to choose cells of the grid, all as many: [rows, columns] bool of a layout and a picture."""

    def by_plugin(pruner: VisualPruner) -> Callable[[ImageLayout, ImageFeatures], Tensor]:
        def choose(layout: ImageLayout, picture: ImageFeatures) -> Tensor:
            kept = torch.zeros(layout.num_tokens, dtype=torch.bool)
            kept[pruner.select(layout, pruner.plan(layout), picture)] = True
            return grids.grid_values(layout, kept)

        return choose

    def at_random(layout: ImageLayout, picture: ImageFeatures) -> Tensor:
        values = torch.rand(layout.grid_tokens, generator=torch.Generator().manual_seed(layout.grid_tokens))
        kept = torch.zeros(layout.grid_tokens, dtype=torch.bool)
        kept[top_indices(values, int(layout.grid_tokens * retain))] = True
        return kept.view(layout.grid)

    def uniform(layout: ImageLayout, picture: ImageFeatures) -> Tensor:
        count = int(layout.grid_tokens * retain)
        kept = torch.zeros(layout.grid_tokens, dtype=torch.bool)
        kept[(torch.arange(count) * layout.grid_tokens / count).long()] = True
        return kept.view(layout.grid)

    def per_crop(layout: ImageLayout, picture: ImageFeatures) -> Tensor:
        assert picture.scores is not None
        counts = allocate_tokens(
            layout.crop_tokens, [n * retain for n in layout.crop_tokens], int(layout.grid_tokens * retain)
        )
        return grids.top_patches_per_crop(layout, grids.stitch_crops(layout, picture.scores), counts)

    return {
        "random": at_random,
        "uniform": uniform,
        "per_crop": per_crop,
        "globalcom2": by_plugin(GlobalCom2(GlobalCom2Options(retain))),
        "diversity": by_plugin(Diversity(DiversityOptions(retain))),
        "diversity@method=determinantal": by_plugin(Diversity(DiversityOptions(retain, "determinantal"))),
    }


def _cells(box: tuple[int, int, int, int], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cells of a grid whose middle lies in a box of a picture."""
    (left, top, right, bottom), (width, height), (rows, columns) = box, size, grid
    y, x = (torch.arange(rows) + 0.5) * height / max(rows, 1), (torch.arange(columns) + 0.5) * width / max(columns, 1)
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]


class Saliency:
    """What stands out in a picture, as the network says in which the test models' tower was found."""

    def __init__(self) -> None:
        import onnxruntime

        self._session: Any = onnxruntime.InferenceSession(
            str(vision_test_models.vit_source()), providers=["CPUExecutionProvider"]
        )

    def of(self, image: Any, grid: tuple[int, int]) -> Tensor:
        """[rows, columns] for the cells of a grid."""
        pixels = np.asarray(image.resize((224, 224)), np.float32).transpose(2, 0, 1) / 255
        mean, deviation = (
            np.array(v, np.float32)[:, None, None] for v in (vision_test_models.MEAN, vision_test_models.DEVIATION)
        )
        (seen,) = self._session.run(["output_importance"], {"input_image": ((pixels - mean) / deviation)[None]})
        return grids.resize_grid(torch.from_numpy(seen).reshape(seen.shape[-2:]), grid)
