"""Pilotfish: plugins for a stock vLLM engine, and a retrieval stack beside it.

What a plugin author needs is importable from here: ``hookimpl``, the abstract base class of each plugin type, and the
values that its methods take and return. Importing this module imports neither NumPy, torch nor vLLM; the names are
resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kvcache.head_window import HeadPlan, HeadWindow
    from .kvcache.selection import ReadPlan, Role, SelectionRule
    from .plugins.contracts import (
        Candidates,
        DeviceBatch,
        DeviceDrafter,
        DeviceLimits,
        DraftBudget,
        Drafter,
        DraftRequest,
        DraftTree,
        Encoder,
        Engine,
        ImageFeatures,
        ImageLayout,
        IndexKind,
        KVPolicy,
        LayerSchedule,
        NoOptions,
        PrunePlan,
        ScoreExplanation,
        TermWeights,
        Unsupported,
        VisualPruner,
    )
    from .plugins.hookspecs import hookimpl
    from .retrieval.sparse_vectors import SparseVectors
    from .retrieval.token_embeddings import TokenEmbeddings

__version__ = "0.1.0"
__all__ = [
    "Candidates",
    "DeviceBatch",
    "DeviceDrafter",
    "DeviceLimits",
    "DraftBudget",
    "DraftRequest",
    "DraftTree",
    "Drafter",
    "Encoder",
    "Engine",
    "HeadPlan",
    "HeadWindow",
    "ImageFeatures",
    "ImageLayout",
    "IndexKind",
    "KVPolicy",
    "LayerSchedule",
    "NoOptions",
    "PrunePlan",
    "ReadPlan",
    "Role",
    "ScoreExplanation",
    "SelectionRule",
    "SparseVectors",
    "TermWeights",
    "TokenEmbeddings",
    "Unsupported",
    "VisualPruner",
    "__version__",
    "hookimpl",
]
# Modules of the names that are not in `plugins.contracts`.
_MODULES = {
    "HeadPlan": ".kvcache.head_window",
    "HeadWindow": ".kvcache.head_window",
    "ReadPlan": ".kvcache.selection",
    "Role": ".kvcache.selection",
    "SelectionRule": ".kvcache.selection",
    "SparseVectors": ".retrieval.sparse_vectors",
    "TokenEmbeddings": ".retrieval.token_embeddings",
    "hookimpl": ".plugins.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, ".plugins.contracts"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
