"""KV policies."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Engine, Plugin

if TYPE_CHECKING:
    from ...kvcache.head_window import HeadPlan
    from ...kvcache.selection import ReadPlan


class KVPolicy(Plugin, ABC):
    """Which keys and values a layer reads, or keeps. With a budget that covers the context it is stock attention.

    A policy has one of two plans; the other is None.
    """

    frees_blocks: ClassVar[bool] = False  # by a `head_plan`; there is no prefix caching then

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    def read_plan(self) -> "ReadPlan | None":
        """What every layer reads in a decode step; everything stays in memory."""
        return None

    def head_plan(self) -> "HeadPlan | None":
        """Which heads keep everything; what the others drop is free memory."""
        return None
