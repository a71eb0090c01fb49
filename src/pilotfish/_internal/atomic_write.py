"""Atomic writes: a file or folder appears complete or not at all, also after a crash or a power failure."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray


@contextlib.contextmanager
def open_atomic(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` when the block ends without an error, synced to disk.

    The file gets the permissions ``mode`` under any umask.

    Raises:
        OSError: The disk is full or the folder is not writable; ``path`` is unchanged.
    """
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(mode)  # mkstemp allows the owner only
        Path(partial).replace(path)
        sync_folder(path.parent)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def file_mode(folder: Path) -> int:
    """Return the permissions of the files of a folder that all its users share: those of the folder itself."""
    return folder.stat().st_mode & 0o666


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> str:
    """Write ``content`` and return its SHA-256."""
    with open_atomic(path, mode) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def write_array(path: Path, array: NDArray, mode: int = 0o644) -> str:
    """Write an array in NumPy's ``.npy`` format, without pickle, and return the file's SHA-256."""
    with open_atomic(path, mode) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def temporary_folder_beside(folder: Path) -> Iterator[Path]:
    """Make an empty folder in the parent of ``folder``, to be filled and moved into place; removed when the block ends.

    The parent is made if needed. Move the result with `replace_folder`, or with ``Path.rename`` where an existing
    ``folder`` must win.

    Raises:
        OSError: The parent cannot be made or written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    partial.chmod(0o755)  # mkdtemp allows the owner only
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Move a complete folder into place. Processes that have files of the old one mapped keep them.

    Raises:
        OSError: The folder cannot be moved.
    """
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)


def sync_folder(folder: Path) -> None:
    """Make new and replaced names in a folder durable, on systems that support it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
