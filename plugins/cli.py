"""What commands of several plugins share."""

import unicodedata
from collections.abc import Sequence

import typer

from .config import ConfigError

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def strip_control_characters(text: str) -> str:
    """A stranger's text for a terminal: without the characters that would command it, or turn the writing around."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in _TURNING))


def single_line(flag: str, values: Sequence[str] | None) -> str | None:
    """An option that may be given once: of several, others would go without a word.

    Raises:
        ConfigError: it was given more than once.
    """
    if values is not None and len(values) > 1:
        raise ConfigError(
            f"{flag}: given {len(values)} times ({', '.join(values)}); one plugin of a kind serves an engine"
        )
    return values[0] if values else None


def extend_group(cli: typer.Typer, name: str, group: typer.Typer, task: str | None = None) -> None:
    """Add a group of commands; where one of that name is there already, its commands go into it."""
    for known in cli.registered_groups:
        if known.name == name and known.typer_instance is not None:
            known.typer_instance.registered_commands += group.registered_commands
            return
    cli.add_typer(typer.Typer(help=group.info.help, no_args_is_help=True), name=name, rich_help_panel=task)
    extend_group(cli, name, group, task)
