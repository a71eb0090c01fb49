"""The numba decorator of Pilotfish. Import it late: numba imported before vLLM 0.32 starts breaks its CPU engine."""

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable)


def jit(function: F) -> F:
    """Compile with numba in nopython mode, without the GIL, cached on disk.

    Where no cache folder can be written, as in some containers, the function is compiled at each start.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[return-value]
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[return-value]
