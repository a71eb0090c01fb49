"""Modules that are imported when something of theirs is first asked for.

Every command loads every plugin, to know its name and options; torch alone takes longer than most commands do.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "torch"]


class Later:
    """Stands for a module.

    Args:
        name: Of the module, in full.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional  # noqa: PLR0402 -- in the other form pyright does not see it
else:
    torch, functional = Later("torch"), Later("torch.nn.functional")
