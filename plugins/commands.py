"""`pilotfish plugins`: what is installed, what it offers, and what failed to load."""

import dataclasses
import inspect
import json
import typing
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import type_name
from .hookspecs import hookimpl
from .manager import HOOKS, disabled, plugins


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("plugins")(list_plugins)


def list_plugins(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List installed plugins: kind, name, origin, and options with types, defaults and help."""
    manager = plugins()
    listed = [describe_plugin(kind, cls) for kind in HOOKS for cls in manager.classes(kind).values()]
    if as_json:
        failed = [dataclasses.asdict(f) for f in manager.failures]
        typer.echo(json.dumps({"plugins": listed, "failed": failed, "disabled": disabled()}, indent=2))
        return
    console = Console()
    table = Table("kind", title="Installed plugins")
    for column in ("plugin", "option", "type", "default", "help"):
        table.add_column(column, overflow="fold")  # a name that is cut cannot be typed
    for plugin in listed:
        first = (plugin["kind"], f"{plugin['name']}\n[dim]from {plugin['origin']}[/]")
        for i, option in enumerate(plugin["options"] or [{}]):
            cells = (
                option.get("name", ""),
                option.get("type", ""),
                json.dumps(option.get("default")),
                option.get("help", ""),
            )
            cells = tuple(map(escape, cells))  # brackets are meant, not markup
            table.add_row(*(first if i == 0 else ("", "")), *cells, end_section=i + 1 >= len(plugin["options"]))
    console.print(table)
    for failure in manager.failures:
        console.print(f"failed to load: {failure.plugin}: {failure.error}", markup=False, style="red")
    if disabled():
        console.print("PILOTFISH_DISABLE is set: nothing is attached to an engine", style="yellow")


def describe_plugin(kind: str, cls: Any) -> dict[str, Any]:
    """A registered class as plain values."""
    hints, notes = typing.get_type_hints(cls.Options), option_help(cls.Options)
    options = [
        {"name": f.name, "type": type_name(hints[f.name]), "default": default_value(f), "help": notes.get(f.name, "")}
        for f in dataclasses.fields(cls.Options)
    ]
    return {
        "kind": kind,
        "name": cls.name,
        "origin": plugins().origin(cls),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "options": options,
    }


def default_value(option: dataclasses.Field) -> Any:
    """What an option is where nothing is said."""
    return option.default_factory() if callable(option.default_factory) else option.default


def option_help(options: type) -> dict[str, str]:
    """The ``Attributes:`` section of a dataclass's docstring, by name."""
    notes: dict[str, str] = {}
    name = ""
    _, _, section = (inspect.getdoc(options) or "").partition("Attributes:\n")
    for line in section.splitlines():
        text = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in text:
            name, _, text = text.partition(":")
            notes[name] = text.strip()
        elif name and text:
            notes[name] += f" {text}"
    return notes
