"""Patches that replace an attribute of a vLLM module or class and can be undone."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ORIGINAL = "__pilotfish_original__"


@dataclass(frozen=True)
class Patch:
    """Replacement of one attribute of a module or class.

    Attributes:
        module: Name of the module.
        attribute: Dotted name of the attribute within the module.
        wrap: Function from the original to its replacement.
    """

    module: str
    attribute: str
    wrap: Callable[[Any], Any]

    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name

    @property
    def applied(self) -> bool:
        """Whether the replacement is in place."""
        owner, name = self._owner()
        return hasattr(getattr(owner, name), _ORIGINAL)

    def apply(self) -> None:
        """Replace the attribute; no effect if it is already replaced."""
        owner, name = self._owner()
        original = getattr(owner, name)
        if hasattr(original, _ORIGINAL):
            return
        replacement = functools.wraps(original)(self.wrap(original))
        setattr(replacement, _ORIGINAL, original)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Restore the original."""
        owner, name = self._owner()
        current = getattr(owner, name)
        if hasattr(current, _ORIGINAL):
            setattr(owner, name, getattr(current, _ORIGINAL))
