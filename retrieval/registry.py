"""Registered index types and encoders by name, and settings of searches.

Apart from the commands, this is the only module of the retrieval stack that uses the plugin manager. The manager is
imported inside the functions, so that an index can be opened before plugins are loaded.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import RetrievalError


def resolve_index_kind(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a registered index type, initialised with options, and its parsed options.

    Raises:
        RetrievalError: There is no index type of that name, or an option is invalid.
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
    """Check that no setting has the name of an argument of the search methods, and return the settings.

    Raises:
        RetrievalError: A setting has such a name.
    """
    for name in ("self", "query", "queries", "k", "where", "snapshot", "name"):
        if name in values:
            raise RetrievalError(f"settings: {name} is a search argument, not a setting; pass it separately")
    return values


def absolute_encoder_name(encoder: str) -> str:
    """Return an encoder's name with absolute folders, also in the form ``MEMBER=FOLDER,...`` of a hybrid index."""
    if Path(encoder).is_dir():
        return str(Path(encoder).absolute())
    parts = [part.rpartition("=") for part in encoder.split(",")]
    return ",".join(f"{m}{e}{Path(p).absolute() if e and Path(p).is_dir() else p}" for m, e, p in parts)


def resolve_encoder(kind: Any, name: str, device: str, precision: str) -> Any:
    """Load a registered encoder, or else the encoder that the index type loads under this name.

    Raises:
        RetrievalError: There is no such encoder, or it cannot be loaded.
    """
    from ..plugins.manager import plugins

    cls: Any = plugins().classes("encoder").get(name)
    if cls is not None:
        return cls(cls.Options(), device, precision)
    return kind.load_encoder(name, device, precision)


class LazyEncoder:
    """Encoder that is loaded on the first call, once for all threads."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._mutex = load, threading.Lock()
        self._loaded: Any = None

    def __call__(self) -> Any:
        """Return the encoder.

        Raises:
            RetrievalError: The encoder cannot be loaded, or is not the one that the index was created with.
        """
        with self._mutex:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded
