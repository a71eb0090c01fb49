"""Return of freed memory to the operating system."""

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
    """Return freed heap memory to the operating system (glibc's ``malloc_trim``).

    The arrays of commits and merges fragment the heap, and the resident memory of a server whose documents change all
    the time would grow by hundreds of megabytes. The call takes milliseconds; without glibc it does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
