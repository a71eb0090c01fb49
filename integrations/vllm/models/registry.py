"""The embedded models and test models by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .base import LocalModel, Progress, fetch_model
from .embedded import SMOLLM2


@dataclass(frozen=True)
class ComposedModel(LocalModel):
    """A model for pictures whose words mean nothing, see `vision.checkpoint`."""

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Put it together; that takes seconds."""
        from . import vision_test_models

        vision_test_models.build_test_model(self.name, folder)

    def check_source(self) -> None:
        """Its tower, and the language model."""
        from . import vision_test_models

        vision_test_models.vit_source()
        SMOLLM2.check_source()


TEST_MODELS = ("test-llava", "test-llava-next", "test-llava-onevision")


EMBEDDED: Mapping[str, LocalModel] = {SMOLLM2.name: SMOLLM2, **{name: ComposedModel(name) for name in TEST_MODELS}}


def resolve_model(model: str) -> str:
    """The folder of an embedded model (fetched if need be) for its name; anything else unchanged."""
    return str(fetch_model(EMBEDDED[model])) if model in EMBEDDED else model
