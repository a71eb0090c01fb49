"""The hooks that a plugin may implement.

A plugin is a module (or an object) named by an entry point of the group ``pilotfish``. It implements a hook as a
function of the same name, marked with ``@hookimpl``. All hooks are optional.

The hooks that register classes are called once in each process, when the plugin is loaded. They get a callback
``register``, and call it once for each class. A class needs a ``name``, which no other class of the same type may have,
and its ``Options``, a frozen dataclass. If a hook raises an exception, no class of the plugin is registered, and all
other plugins work as before. `pilotfish doctor` reports the error.
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
    """Register KV policies.

    Called when the plugin is loaded. Users select a KV policy with ``--kv NAME``.

    Args:
        register: Callback to call with each subclass of `contracts.KVPolicy`.
    """


@hookspec
def register_drafters(register: Register) -> None:
    """Register drafters for speculative decoding.

    Called when the plugin is loaded. Users select a drafter with ``--drafter NAME``.

    Args:
        register: Callback to call with each subclass of `contracts.Drafter`.
    """


@hookspec
def register_pruners(register: Register) -> None:
    """Register visual pruners for multimodal models.

    Called when the plugin is loaded. Users select a pruner with ``--pruner NAME``.

    Args:
        register: Callback to call with each subclass of `contracts.VisualPruner`.
    """


@hookspec
def register_indexes(register: Register) -> None:
    """Register index types for retrieval.

    Called when the plugin is loaded. Users select an index type with ``pilotfish index build --kind NAME``.

    Args:
        register: Callback to call with each subclass of `contracts.IndexKind`.
    """


@hookspec
def register_encoders(register: Register) -> None:
    """Register encoders, which turn texts into the representations that an index stores.

    Called when the plugin is loaded. Users select an encoder with ``pilotfish index build --encoder NAME``. A name that
    is registered here takes precedence over the encoders that an index type brings.

    Args:
        register: Callback to call with each subclass of `contracts.Encoder`.
    """


@hookspec
def register_commands(cli: Any) -> None:
    """Add commands to the `pilotfish` command line.

    Called after all plugins are loaded, each time the command line is built.

    Args:
        cli: The `typer.Typer` application to which commands and command groups are added.
    """
