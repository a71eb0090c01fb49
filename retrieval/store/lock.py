"""Lock of an index: writers of one process queue, and writers of other processes wait for a limited time."""

import contextlib
import os
import platform
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from pilotfish._internal.atomic_write import file_mode

from ..defaults import LOCK_TIMEOUT
from ..errors import LockedIndex

LOCK, HOLDER = "write.lock", "write.pid"


class _Queue:
    """Queue of the threads of this process that want to write to one index."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    @contextlib.contextmanager
    def turn(self, folder: Path, wait: bool) -> Iterator[None]:
        """Wait for the turn of this thread.

        Raises:
            LockedIndex: This thread writes already, for example from a callback, or another does and ``wait`` is False.
        """
        again = self._thread == threading.get_ident()
        if again or not self._lock.acquire(blocking=wait):
            where = "in this thread" if again else "in another thread"
            raise LockedIndex(f"{folder}: process {os.getpid()} writes to this index {where}; wait until it is done")
        try:
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = None
            self._lock.release()


_mutex = threading.Lock()  # of `_queues`
_queues: weakref.WeakValueDictionary[Path, _Queue] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def write_lock(folder: Path, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold the lock of the index in a folder; wait as long as another thread of this process holds it.

    Args:
        folder: Folder of the index.
        timeout: Seconds to wait for a writer in another process; with 0, other threads are not waited for, either.

    Raises:
        LockedIndex: Another process still writes to the index after ``timeout``, or the index may not be written. The
            message names the process.
    """
    from filelock import FileLock, Timeout

    with _queue(folder).turn(folder, timeout > 0):
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            waited = f", waited for {timeout:g} s" if timeout > 0 else ""
            raise LockedIndex(
                f"{folder}: {_holder(folder)} writes to this index{waited}; try again when it is done, or raise "
                "lock_timeout"
            ) from None
        except PermissionError as error:
            raise LockedIndex(f"{folder}: may not be written ({error.strerror})") from None
        try:
            _sign(folder)
            yield
        finally:
            lock.release()


def _queue(folder: Path) -> _Queue:
    """Return the queue of a folder."""
    with _mutex:
        return _queues.setdefault(folder.resolve(), _Queue())


def _after_fork() -> None:
    """Forget locks that threads of the parent process hold: these threads do not exist in the child."""
    global _mutex, _queues
    _mutex, _queues = threading.Lock(), weakref.WeakValueDictionary()


os.register_at_fork(after_in_child=_after_fork)


def _holder(folder: Path) -> str:
    """Return a description of the process that holds the lock."""
    try:
        pid, _, machine = (folder / HOLDER).read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return "another process"
    if not pid.isdigit():
        return "another process"
    return f"process {pid}" + (f" on {machine}" if machine not in ("", platform.node()) else "")


def _sign(folder: Path) -> None:
    """Write the process id and the name of this machine for the messages of other processes."""
    with contextlib.suppress(OSError):
        (folder / HOLDER).write_text(f"{os.getpid()} {platform.node()}\n", encoding="utf-8")
        for name in (LOCK, HOLDER):
            (folder / name).chmod(file_mode(folder))
