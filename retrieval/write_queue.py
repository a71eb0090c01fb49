"""Changes of an index that a server is asked for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class SerialExecutor:
    """Work that is done in the order it came, by a thread of its own.

    Writers exclude each other, and those that waited for their turn in the threads that serve readers would leave none.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pilotfish-writes")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """Do ``work``; whatever it raises comes from here."""
        return await asyncio.wrap_future(self._thread.submit(work, *args))
