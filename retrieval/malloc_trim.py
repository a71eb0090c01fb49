"""Memory that was freed, back to the system."""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def release_memory() -> None:
    """Let the C library return what it keeps: arrays of commits and merges leave gaps that it holds on to for good.

    Without it a server whose documents change all the time seems to grow by hundreds of megabytes. Takes milliseconds;
    does nothing where the C library is not glibc.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
