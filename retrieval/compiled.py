"""Compiling with numba. Import this late: numba imported before vLLM 0.32 starts breaks its CPU engine."""

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable)


def compiled(function: F) -> F:
    """Compile, and keep the result on disk; where no folder can be written (some containers), compile at each start."""
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[return-value]
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[return-value]
