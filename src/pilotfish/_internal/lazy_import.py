"""Modules that are imported when one of their attributes is first used.

Every command loads every plugin to know its name and options. Importing torch alone takes longer than most commands.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "torch"]


class LazyModule:
    """A proxy that imports a module when one of its attributes is first used.

    Args:
        name: The full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional  # noqa: PLR0402 -- pyright does not resolve the other form
else:
    torch, functional = LazyModule("torch"), LazyModule("torch.nn.functional")
