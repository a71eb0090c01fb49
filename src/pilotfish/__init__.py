"""Pilotfish: plugins for a stock vLLM engine, and a retrieval stack beside it.

What a plugin author needs is importable from here: ``hookimpl`` and the abstract base class of each plugin type.
Importing this module imports neither NumPy, torch nor vLLM; the names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plugins.contracts import Drafter, Encoder, IndexKind, KVPolicy, VisualPruner
    from .plugins.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = ["Drafter", "Encoder", "IndexKind", "KVPolicy", "VisualPruner", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name == "hookimpl":
        return importlib.import_module(".plugins.hookspecs", __name__).hookimpl
    if name in __all__:
        return getattr(importlib.import_module(".plugins.contracts", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
