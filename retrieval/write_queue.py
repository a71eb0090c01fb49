"""Sequential execution of the writes of a server."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class SerialExecutor:
    """Executor that runs calls in their order of arrival on one dedicated thread.

    Writers exclude each other. If they waited in the thread pool of the readers, they could occupy all its threads.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pilotfish-writes")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` and return its result, or raise its exception."""
        return await asyncio.wrap_future(self._thread.submit(work, *args))
