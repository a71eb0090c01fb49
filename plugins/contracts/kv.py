"""The contract of KV policies: which keys and values a layer reads, or keeps in the KV cache."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Engine, Plugin

if TYPE_CHECKING:
    from ...kvcache.head_window import HeadPlan
    from ...kvcache.selection import ReadPlan


class KVPolicy(Plugin, ABC):
    """Base class of KV policies.

    A policy implements one of two plans. `read_plan` limits which tokens the layers read in a decode step, and all KV
    blocks stay in memory. `head_plan` limits which tokens the heads keep, and evicted KV blocks are freed. The other
    method returns None. If the budget covers the context, the output is that of full attention.

    Attributes:
        frees_blocks: Whether KV blocks are freed, by a `head_plan`. Prefix caching is not possible then.
    """

    frees_blocks: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    def read_plan(self) -> "ReadPlan | None":
        """Return what every layer reads in a decode step; None if the policy has a `head_plan`."""
        return None

    def head_plan(self) -> "HeadPlan | None":
        """Return which heads keep all tokens, and the window of the others; None if the policy has a `read_plan`."""
        return None
