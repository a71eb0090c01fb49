"""Base class of models that are built on this machine and stored in the cache folder."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pilotfish._internal.atomic_write import temporary_folder_beside
from pilotfish._internal.cache_dir import cache_dir

from ....plugins.config import ConfigError

Progress = Callable[[int, int], None]  # (bytes written, total bytes)


class ModelError(ConfigError):
    """Raised if an embedded model cannot be built; the message names the remedy."""


@dataclass(frozen=True)
class LocalModel:
    """Model whose folder is built on this machine.

    Attributes:
        name: Name of the model.
    """

    name: str

    @property
    def folder(self) -> Path:
        """Folder of the model in the cache."""
        return cache_dir() / "models" / self.name

    @property
    def fetched(self) -> bool:
        """Whether the model exists in the cache."""
        return (self.folder / "config.json").is_file()

    def check_source(self) -> None:
        """Check that the sources of the model exist, before it is built.

        Raises:
            ModelError: A source is missing or damaged.
        """

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Write the model into an empty folder.

        Args:
            folder: The folder.
            progress: Callback that receives the numbers of written and of all bytes.

        Raises:
            ModelError: A source is missing or damaged.
        """
        raise NotImplementedError(f"{self.name}: {type(self).__name__} does not implement build")

    def verify(self) -> bool:
        """Return whether the weights in the cache can be read and, if their digest is known, match it."""
        return readable_digest(self.folder / "model.safetensors") is not None


def weights_digest(path: Path) -> str:
    """Return the SHA-256 hex digest of the tensors in a safetensors file, independent of its header."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def readable_digest(weights: Path) -> str | None:
    """Return the digest of a safetensors file; None if it cannot be read."""
    try:
        return weights_digest(weights) if weights.is_file() else None
    except Exception:  # safetensors raises its own exception types
        return None


def fetch_model(model: LocalModel, progress: Progress | None = None) -> Path:
    """Build the model in the cache if it does not exist there, and return its folder.

    Args:
        model: The model.
        progress: Callback that receives the numbers of written and of all bytes.

    Raises:
        ModelError: A source is missing or damaged, or the cache cannot be written.
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
        except OSError:  # another process was first; its folder is complete, since it was renamed as well
            if not model.fetched:
                raise
    return model.folder
