"""Registry of embedded models and test models by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .base import LocalModel, Progress, fetch_model
from .embedded import SMOLLM2


@dataclass(frozen=True)
class ComposedModel(LocalModel):
    """Vision-language test model with a random projector, see `vision_test_models`; its answers are meaningless."""

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Compose the model from its parts, which takes seconds."""
        from . import vision_test_models

        vision_test_models.build_test_model(self.name, folder)

    def check_source(self) -> None:
        """Check the packages of the vision encoder and of the language model."""
        from . import vision_test_models

        vision_test_models.vit_source()
        SMOLLM2.check_source()


TEST_MODELS = ("test-llava", "test-llava-next", "test-llava-onevision")


EMBEDDED: Mapping[str, LocalModel] = {SMOLLM2.name: SMOLLM2, **{name: ComposedModel(name) for name in TEST_MODELS}}


def resolve_model(model: str) -> str:
    """Return the folder of an embedded model, built if necessary, for its name; return other values unchanged."""
    return str(fetch_model(EMBEDDED[model])) if model in EMBEDDED else model
