"""Retrieval stack of the index plugins: encoders, indexes, storage, evaluation and an HTTP server.

`Index` is the public API; it is imported on first access.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import RetrievalError
    from .index import Hit, Index

__all__ = ["Hit", "Index", "RetrievalError"]


def __getattr__(name: str) -> Any:
    if name in ("Hit", "Index"):
        from . import index

        return getattr(index, name)
    if name == "RetrievalError":
        from .errors import RetrievalError

        return RetrievalError
    raise AttributeError(name)
