"""Builds in a temporary folder: an index appears in its place when it is complete, and a failed build leaves nothing.

A build that is interrupted (killed, or stopped by an error) after documents were committed can be resumed; the hidden
folder beside the index holds them until then. A new build discards it.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pilotfish._internal.atomic_write import sync_folder

from .errors import RetrievalError
from .store import check_new_folder
from .store.lock import write_lock
from .store.manifest import CURRENT, current_manifest, read_manifest


def partial_folder(folder: Path) -> Path:
    """Return the temporary folder in which the index of ``folder`` is built."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def build_folder(folder: Path, resume: bool = False) -> Iterator[Path]:
    """Yield the temporary folder of a build, and move it to ``folder`` when the block ends without an error.

    The block has to close the index. When it fails, the temporary folder is removed unless documents were committed.

    Args:
        folder: Folder of the index; must be empty or not exist yet.
        resume: Whether the temporary folder of an interrupted build is kept; otherwise the block finds none.

    Raises:
        RetrievalError: ``folder`` is not empty, is a mount point, or lies in another index, or the block raised it.
        LockedIndex: Another process builds this index.
        OSError: The parent of ``folder`` cannot be written.
    """
    check_new_folder(folder)
    if folder.is_mount():
        raise RetrievalError(f"{folder}: is a mount point, which an index cannot replace; choose a folder in it")
    partial = partial_folder(folder)
    if (partial / CURRENT).exists():
        with write_lock(partial, timeout=0):  # another process may be building
            pass
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        check_new_folder(folder)
        if folder.is_dir():
            shutil.rmtree(folder)
        partial.rename(folder)
        sync_folder(folder.absolute().parent)
    except BaseException as error:
        kept = _documents(partial)
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, RetrievalError):
            raise RetrievalError(f"{error}; --resume continues after the {kept} documents indexed so far") from None
        raise


def _documents(partial: Path) -> int:
    """Return the number of documents that an unfinished build has committed; 0 if there is no index."""
    try:
        return read_manifest(partial, current_manifest(partial)).count
    except RetrievalError:
        return 0
