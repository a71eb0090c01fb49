"""Models that are built on this machine and kept in the cache folder."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pilotfish._internal.atomic_write import temporary_folder_beside
from pilotfish._internal.cache_dir import cache_dir

from ....plugins.config import ConfigError

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


class ModelError(ConfigError):
    """The embedded model cannot be had; the message says what to do."""


@dataclass(frozen=True)
class LocalModel:
    """A model whose folder is made here."""

    name: str

    @property
    def folder(self) -> Path:
        """Where the model lies once fetched."""
        return cache_dir() / "models" / self.name

    @property
    def fetched(self) -> bool:
        """Whether the model lies in the cache."""
        return (self.folder / "config.json").is_file()

    def check_source(self) -> None:
        """See, before anything is begun, whether what it is made of is there.

        Raises:
            ModelError: it is not.
        """

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Write the model into an empty folder.

        Raises:
            ModelError: what it is made of is missing or damaged.
        """
        raise NotImplementedError(f"{self.name}: a model of a kind that does not say how it is made")

    def verify(self) -> bool:
        """Whether the weights in the cache can be read, and are the ones expected where that is known."""
        return readable_digest(self.folder / "model.safetensors") is not None


def weights_digest(path: Path) -> str:
    """Hex digest of the tensors in a safetensors file, by name, whatever its header looks like."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def readable_digest(weights: Path) -> str | None:
    """Digest of weights; None where they cannot be read."""
    try:
        return weights_digest(weights) if weights.is_file() else None
    except Exception:  # safetensors has errors of its own
        return None


def fetch_model(model: LocalModel, progress: Progress | None = None) -> Path:
    """Make sure that the model lies in the cache, and return its folder.

    Raises:
        ModelError: the package is missing or damaged, or the cache cannot be written.
    """
    if model.fetched:
        return model.folder
    model.check_source()
    parent = model.folder.parent
    with contextlib.ExitStack() as stack:
        try:
            building = stack.enter_context(temporary_folder_beside(model.folder))
        except OSError as error:
            raise ModelError(f"{model.name}: cannot write {parent} ({error.strerror}); set PILOTFISH_CACHE") from None
        model.build(building, progress)
        try:
            building.rename(model.folder)
        except OSError:  # another process was first; its folder is complete, since it was renamed too
            if not model.fetched:
                raise
    return model.folder
