"""The plugin manager: it loads plugins from entry points, and looks up the classes that they register.

``PILOTFISH_LOAD_PLUGINS`` (names of entry points, separated by commas) is an allow-list; the empty string allows none.
``PILOTFISH_DISABLE=1`` is the kill switch: the configuration is not read, and no plugin is attached to an engine.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .config import COMMON_OPTIONS, ConfigError, Selection, build_options, unknown_key_message

GROUP = hookspecs.PROJECT

# plugin type in the configuration -> hook that registers its classes
HOOKS = {
    "kv": "register_kv_policies",
    "drafter": "register_drafters",
    "pruner": "register_pruners",
    "index": "register_indexes",
    "encoder": "register_encoders",
}


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be imported or registered.

    Attributes:
        plugin: Name of the entry point.
        error: Type and message of the exception.
    """

    plugin: str
    error: str


def disabled() -> bool:
    """Return whether the kill switch is set, to any value except "", 0, false, no and off."""
    return os.environ.get("PILOTFISH_DISABLE", "").strip().lower() not in {"", "0", "false", "no", "off"}


def allowed_plugins(name: str) -> bool:
    """Return whether the allow-list permits loading the entry point ``name``."""
    names = os.environ.get("PILOTFISH_LOAD_PLUGINS")
    return names is None or name in {n.strip() for n in names.split(",")}


class PluginManager:
    """The registered classes by type and name; built-in plugins are registered like third-party plugins."""

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in HOOKS}
        self._origins: dict[type, str] = {}
        self.failures: list[Failure] = []

    def load(self, points: Iterable[EntryPoint] | None = None) -> "PluginManager":
        """Load the entry points of the group ``pilotfish`` that the allow-list permits.

        Exceptions are recorded in ``failures``, not raised.

        Args:
            points: Entry points to load; those of the group if not given.
        """
        for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda p: p.name):
            if not allowed_plugins(point.name):
                continue
            try:
                self.register(point.load(), point.name)
            except Exception as error:  # a third-party module may raise anything; only users who select it are affected
                self.failures.append(Failure(point.name, f"{type(error).__name__}: {error}"))
        return self

    def register(self, plugin: object, name: str) -> None:
        """Register a plugin and its classes.

        Args:
            plugin: Module or object that implements hooks.
            name: Name of the plugin.

        Raises:
            ValueError: A class has no name, or its name is taken by another class of the same type.
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
        """Unregister a plugin and its classes."""
        self._pluggy.unregister(name=name)
        gone = {cls for cls, origin in self._origins.items() if origin == name}
        for cls in gone:
            del self._origins[cls]
        for classes in self._classes.values():
            for key in [k for k, cls in classes.items() if cls in gone]:
                del classes[key]

    def _collect(self, plugin: object, name: str) -> dict[str, list[type]]:
        # Only the hooks of the new plugin are called, so that no class is registered twice.
        others = [p for p in self._pluggy.get_plugins() if p is not plugin]
        brought: dict[str, list[type]] = {kind: [] for kind in HOOKS}
        for kind, hook in HOOKS.items():

            def register(cls: type, kind: str = kind) -> None:
                label = getattr(cls, "name", None)
                if not isinstance(label, str) or not label:
                    raise ValueError(f"{cls.__qualname__}: the class attribute `name` is missing")
                if label in self._classes[kind] or label in {c.name for c in brought[kind]}:  # type: ignore[attr-defined]
                    raise ValueError(
                        f"{cls.__qualname__}: '{label}' is registered already for the type {kind}; choose another name"
                    )
                brought[kind].append(cls)

            self._pluggy.subset_hook_caller(hook, others)(register=register)
        return brought

    def classes(self, kind: str) -> dict[str, type]:
        """Return the registered classes of a type, by name."""
        return dict(self._classes[kind])

    def origin(self, cls: type) -> str:
        """Return the name of the plugin that registered a class."""
        return self._origins[cls]

    def add_commands(self, cli: Any) -> None:
        """Call the hook `register_commands` of all plugins."""
        self._pluggy.hook.register_commands(cli=cli)

    def get(self, kind: str, name: str, path: str | None = None) -> type:
        """Return the class of a type that is registered under ``name``.

        Args:
            kind: Plugin type, a key of `HOOKS`.
            name: Name of the class.
            path: Path of the name in the configuration, for messages.

        Raises:
            ConfigError: No such class is registered. The message suggests the nearest name, and contains the errors of
                plugins that failed to load and may have registered the class.
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
        """Return the class of a selection and its validated options.

        Raises:
            ConfigError: No such class is registered, or an option is invalid.
        """
        cls = self.get(kind, selection.name)
        others = [f.name for f in dataclasses.fields(COMMON_OPTIONS[kind])] if kind in COMMON_OPTIONS else ()
        return cls, build_options(cls.Options, selection.options, f"pilotfish.{kind}", others)  # type: ignore[attr-defined]


@functools.cache
def plugins() -> PluginManager:
    """Return the plugin manager of this process; it loads all plugins at the first call."""
    return PluginManager().load()
