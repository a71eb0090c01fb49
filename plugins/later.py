"""Modules that are imported when something of theirs is first asked for.

Every command loads every plugin, to know its name and options; torch alone takes longer than most commands do.
"""

import importlib
from typing import Any


class Later:
    """Stands for a module.

    Args:
        name: Of the module, in full.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
