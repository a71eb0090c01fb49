"""The patch mechanism: replace an attribute of a vLLM class, keep the original, undo."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ORIGINAL = "__pilotfish_original__"


@dataclass(frozen=True)
class Patch:
    """One attribute of a module or class, replaced by what ``wrap`` makes of the original."""

    module: str
    attribute: str  # dotted, within the module
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
        """Replace the attribute, once."""
        owner, name = self._owner()
        original = getattr(owner, name)
        if hasattr(original, _ORIGINAL):
            return
        replacement = functools.wraps(original)(self.wrap(original))
        setattr(replacement, _ORIGINAL, original)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put the original back."""
        owner, name = self._owner()
        current = getattr(owner, name)
        if hasattr(current, _ORIGINAL):
            setattr(owner, name, getattr(current, _ORIGINAL))
