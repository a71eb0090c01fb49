"""Finds plugins by entry point, keeps what they register, and says what failed.

``PILOTFISH_LOAD_PLUGINS`` (names of entry points, comma separated) is an allow-list; the empty string allows none.
``PILOTFISH_DISABLE=1`` is the kill switch: the configuration is not read, and nothing is attached to an engine.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .config import COMMON, ConfigError, Selection, build_options, unknown_key_message

GROUP = hookspecs.PROJECT

# kind in the configuration -> the hook that registers classes of that kind
HOOKS = {
    "kv": "register_kv_policies",
    "drafter": "register_drafters",
    "pruner": "register_pruners",
    "index": "register_indexes",
    "encoder": "register_encoders",
}


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be imported or registered."""

    plugin: str
    error: str


def disabled() -> bool:
    """Whether the kill switch is set: any value counts but for the usual words for no."""
    return os.environ.get("PILOTFISH_DISABLE", "").strip().lower() not in {"", "0", "false", "no", "off"}


def allowed_plugins(name: str) -> bool:
    """Whether the allow-list lets the entry point ``name`` be loaded."""
    names = os.environ.get("PILOTFISH_LOAD_PLUGINS")
    return names is None or name in {n.strip() for n in names.split(",")}


class PluginManager:
    """Registered classes by kind and name; built-ins come through the same door as anybody's."""

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in HOOKS}
        self._origins: dict[type, str] = {}
        self.failures: list[Failure] = []

    def load(self, points: Iterable[EntryPoint] | None = None) -> "PluginManager":
        """Load the entry points of group ``pilotfish`` that the allow-list admits; a failure is kept, not raised."""
        for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda p: p.name):
            if not allowed_plugins(point.name):
                continue
            try:
                self.register(point.load(), point.name)
            except Exception as error:  # a foreign module may raise anything; it stops only those who chose it
                self.failures.append(Failure(point.name, f"{type(error).__name__}: {error}"))
        return self

    def register(self, plugin: object, name: str) -> None:
        """Register a plugin (module or object) and the classes it brings.

        Raises:
            ValueError: when a class has no name, or a name of that kind is taken.
        """
        self._pluggy.register(plugin, name)
        try:
            brought = self._collect(plugin, name)
        except Exception:
            self._pluggy.unregister(plugin)
            raise
        for kind, classes in brought.items():
            for cls in classes:
                self._classes[kind][cls.name] = cls  # type: ignore[attr-defined]
                self._origins[cls] = name

    def unregister(self, name: str) -> None:
        """Forget a plugin and its classes."""
        self._pluggy.unregister(name=name)
        gone = {cls for cls, origin in self._origins.items() if origin == name}
        for cls in gone:
            del self._origins[cls]
        for classes in self._classes.values():
            for key in [k for k, cls in classes.items() if cls in gone]:
                del classes[key]

    def _collect(self, plugin: object, name: str) -> dict[str, list[type]]:
        # Only the new plugin's own hooks are called, so that nothing is registered twice.
        others = [p for p in self._pluggy.get_plugins() if p is not plugin]
        brought: dict[str, list[type]] = {kind: [] for kind in HOOKS}
        for kind, hook in HOOKS.items():

            def register(cls: type, kind: str = kind) -> None:
                label = getattr(cls, "name", None)
                if not isinstance(label, str) or not label:
                    raise ValueError(f"{cls.__qualname__} has no name")
                if label in self._classes[kind] or label in {c.name for c in brought[kind]}:  # type: ignore[attr-defined]
                    raise ValueError(f"a {kind} named '{label}' is registered already")
                brought[kind].append(cls)

            self._pluggy.subset_hook_caller(hook, others)(register=register)
        return brought

    def classes(self, kind: str) -> dict[str, type]:
        """Registered classes of a kind, by name."""
        return dict(self._classes[kind])

    def origin(self, cls: type) -> str:
        """The entry point that brought a class."""
        return self._origins[cls]

    def add_commands(self, cli: Any) -> None:
        """Let every plugin add its commands to the command line."""
        self._pluggy.hook.register_commands(cli=cli)

    def get(self, kind: str, name: str, path: str | None = None) -> type:
        """The class registered under ``name``.

        Raises:
            ConfigError: it is not registered; the message has the nearest name, and the import errors of plugins that
                may have brought it.
        """
        try:
            return self._classes[kind][name]
        except KeyError:
            message = unknown_key_message(f"{path or f'pilotfish.{kind}.name'}: '{name}'", name, self._classes[kind])
            failed = [f for f in self.failures if f.plugin == name] or self.failures
            if failed:
                message += "; failed to load: " + "; ".join(f"{f.plugin} ({f.error})" for f in failed)
            raise ConfigError(message) from None

    def resolve(self, kind: str, selection: Selection) -> tuple[type, Any]:
        """The class that a selection names, and its options, built and checked."""
        cls = self.get(kind, selection.name)
        others = COMMON.get(kind, ())
        return cls, build_options(cls.Options, selection.options, f"pilotfish.{kind}", others)  # type: ignore[attr-defined]


@functools.cache
def plugins() -> PluginManager:
    """The plugins of this process, loaded once."""
    return PluginManager().load()
