"""Registered index types and encoders by name, and settings of searches.

The only module of the retrieval stack, besides its commands, that uses the plugin manager; it is imported late, so that
an index can be opened before plugins are loaded.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import RetrievalError


def resolve_index_kind(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A registered kind of index, and its options.

    Raises:
        RetrievalError: there is none, or one is wrong.
    """
    from ..plugins.config import ConfigError, Selection
    from ..plugins.manager import plugins

    try:
        cls, parsed = plugins().resolve("index", Selection(name, dict(options)))
    except ConfigError as error:
        raise RetrievalError(str(error)) from None
    return cls(parsed), parsed


def build_settings(kind: Any, values: Mapping[str, Any]) -> Any:
    """Build the search settings of an index type from their values.

    Raises:
        RetrievalError: A setting is unknown, or its value has the wrong type.
    """
    from ..plugins.config import ConfigError, build_options

    try:
        return build_options(kind.Settings, values, f"{kind.name} setting")
    except ConfigError as error:
        raise RetrievalError(str(error)) from None


def check_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings, but none that is an argument of the index's methods itself.

    Raises:
        RetrievalError: one is.
    """
    for name in ("self", "query", "queries", "k", "where", "snapshot", "name"):
        if name in values:
            raise RetrievalError(f"settings: {name} is no setting; it stands beside them")
    return values


def absolute_encoder_name(encoder: str) -> str:
    """An encoder's name with folders in full, alone or as ``MEMBER=FOLDER`` of a hybrid."""
    if Path(encoder).is_dir():
        return str(Path(encoder).absolute())
    parts = [part.rpartition("=") for part in encoder.split(",")]
    return ",".join(f"{m}{e}{Path(p).absolute() if e and Path(p).is_dir() else p}" for m, e, p in parts)


def resolve_encoder(kind: Any, name: str, device: str, precision: str) -> Any:
    """A registered encoder, or the kind's own of that name.

    Raises:
        RetrievalError: there is none.
    """
    from ..plugins.manager import plugins

    cls: Any = plugins().classes("encoder").get(name)
    if cls is not None:
        return cls(cls.Options(), device, precision)
    return kind.load_encoder(name, device, precision)


class LazyEncoder:
    """An encoder, loaded when it is called for first, once for all threads."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._mutex = load, threading.Lock()
        self._loaded: Any = None

    def __call__(self) -> Any:
        """The encoder.

        Raises:
            RetrievalError: it is not there, or not the one that the index was made with.
        """
        with self._mutex:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded
