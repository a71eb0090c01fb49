"""The hooks that a plugin may implement, grouped by what they register.

A plugin is a module (or an object) named by an entry point in group ``pilotfish``. Each hook is called once, when the
plugins are loaded, and hands out a callback; a plugin calls it once for every class it brings. All hooks are optional.
"""

from collections.abc import Callable
from typing import Any

import pluggy

PROJECT = "pilotfish"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[type], None]


@hookspec
def register_kv_policies(register: Register) -> None:
    """Register subclasses of `contracts.KVPolicy`."""


@hookspec
def register_drafters(register: Register) -> None:
    """Register subclasses of `contracts.Drafter`."""


@hookspec
def register_pruners(register: Register) -> None:
    """Register subclasses of `contracts.VisualPruner`."""


@hookspec
def register_indexes(register: Register) -> None:
    """Register subclasses of `contracts.IndexKind`."""


@hookspec
def register_encoders(register: Register) -> None:
    """Register subclasses of `contracts.Encoder`."""


@hookspec
def register_commands(cli: Any) -> None:
    """Add commands to the `pilotfish` command line; ``cli`` is its `typer.Typer`."""
