"""`pilotfish plugins`: what is installed, what it offers, and what failed to load."""

import dataclasses
import inspect
import json
import shutil
import textwrap
import typing
from typing import Annotated, Any

import typer

from .cli import strip_control_characters
from .config import COMMON_OPTIONS, ConfigError, type_name, unknown_key_message
from .hookspecs import hookimpl
from .manager import HOOKS, disabled, plugins
from .terminal import SERVING


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("plugins", rich_help_panel=SERVING)(list_plugins)


def list_plugins(
    name: Annotated[str | None, typer.Argument(help="A plugin, whose options are shown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List installed plugins, or show the options of one."""
    manager = plugins()
    described = [describe_plugin(kind, cls) for kind in HOOKS for cls in manager.classes(kind).values()]
    if name is not None:
        shown = [plugin for plugin in described if plugin["name"] == name]
        if not shown:
            raise ConfigError(unknown_key_message(f"plugin '{name}'", name, [p["name"] for p in described]))
    else:
        shown = described
    if as_json:
        failed = [dataclasses.asdict(f) for f in manager.failures]
        typer.echo(json.dumps({"plugins": shown, "failed": failed, "disabled": disabled()}, indent=2))
        return
    if name is not None:
        for plugin in shown:
            _print_options(plugin)
        return
    _print_list(shown)
    for failure in manager.failures:
        message = f"failed to load: {failure.plugin}: {failure.error}"
        typer.secho(strip_control_characters(message), fg=typer.colors.RED)
    if disabled():
        typer.secho("PILOTFISH_DISABLE is set: no plugin is attached to an engine", fg=typer.colors.YELLOW)


def _print_list(described: list[dict[str, Any]]) -> None:
    """Print one line per plugin: type, name and summary."""
    width = shutil.get_terminal_size().columns
    columns = [max(len(p[key]) for p in [*described, {"kind": "type", "name": "name"}]) for key in ("kind", "name")]
    room = max(width - sum(columns) - 4, 20)
    typer.secho(f"{'type':{columns[0]}}  {'name':{columns[1]}}  summary", bold=True)
    for plugin in described:
        summary = textwrap.shorten(plugin["summary"], room, placeholder=" ...")
        typer.echo(f"{plugin['kind']:{columns[0]}}  {plugin['name']:{columns[1]}}  {summary}")
    typer.echo("\n`pilotfish plugins NAME` shows the options of a plugin.")


def _print_options(plugin: dict[str, Any]) -> None:
    """Print a plugin with its options and settings, their types, defaults and help."""
    width = min(shutil.get_terminal_size().columns, 100)
    typer.secho(f"{plugin['name']} ({plugin['kind']}, from {plugin['origin']})", bold=True)
    typer.echo(textwrap.fill(plugin["summary"], width))
    sections = {
        "": plugin["options"],
        f"Options of every {plugin['kind']}:": plugin["common_options"],
        "Search settings (`pilotfish index search --set NAME=VALUE`):": plugin["search_settings"],
    }
    if not any(sections.values()):
        typer.echo("\nThis plugin has no options.")
    for title, options in sections.items():
        if options and title:
            typer.echo(f"\n{title}")
        for option in options:
            typer.echo("")
            head = f"{option['name']}: {option['type']} = {json.dumps(option['default'])}"
            typer.secho(textwrap.fill(head, width, subsequent_indent="    "), bold=True)
            typer.echo(textwrap.fill(option["help"], width, initial_indent="    ", subsequent_indent="    "))


def describe_plugin(kind: str, cls: Any) -> dict[str, Any]:
    """Return a registered class as plain values, for printing and JSON."""
    return {
        "kind": kind,
        "name": cls.name,
        "origin": plugins().origin(cls),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "options": describe_options(cls.Options),
        "common_options": describe_options(COMMON_OPTIONS[kind]) if kind in COMMON_OPTIONS else [],
        "search_settings": describe_options(cls.Settings) if kind == "index" else [],
    }


def describe_options(options: type) -> list[dict[str, Any]]:
    """Return the name, type, default and help of each field of a dataclass of options."""
    hints, notes = typing.get_type_hints(options), option_help(options)
    return [
        {"name": f.name, "type": type_name(hints[f.name]), "default": default_value(f), "help": notes.get(f.name, "")}
        for f in dataclasses.fields(options)
    ]


def default_value(option: dataclasses.Field) -> Any:
    """Return the default of an option."""
    return option.default_factory() if callable(option.default_factory) else option.default


def option_help(options: type) -> dict[str, str]:
    """Return the ``Attributes:`` section of a dataclass's docstring, by name."""
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
