"""Helpers for the command-line commands of plugins."""

import unicodedata
from collections.abc import Sequence

import typer

from .config import ConfigError

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def strip_control_characters(text: str) -> str:
    """Remove control characters and text-direction characters, so that foreign text is safe to print in a terminal."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in _TURNING))


def at_most_one(flag: str, values: Sequence[str] | None) -> str | None:
    """Return the value of an option that may be given only once, so that no value is ignored silently.

    Args:
        flag: Name of the option, for messages.
        values: All values that were given; None for none.

    Raises:
        ConfigError: The option was given more than once.
    """
    if values is not None and len(values) > 1:
        raise ConfigError(
            f"{flag}: given {len(values)} times ({', '.join(values)}); an engine uses one plugin of each type"
        )
    return values[0] if values else None


def extend_group(cli: typer.Typer, name: str, group: typer.Typer, task: str | None = None) -> None:
    """Add a group of commands; if the group exists already, add the commands to it.

    Args:
        cli: Application to which the group is added.
        name: Name of the group.
        group: Group with the commands.
        task: Task under which ``pilotfish --help`` lists a new group, see `terminal.TASKS`.
    """
    for known in cli.registered_groups:
        if known.name == name and known.typer_instance is not None:
            known.typer_instance.registered_commands += group.registered_commands
            return
    cli.add_typer(typer.Typer(help=group.info.help, no_args_is_help=True), name=name, rich_help_panel=task)
    extend_group(cli, name, group, task)
