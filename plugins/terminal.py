"""Terminal output that fits 80 columns: tables, and the grouped list of commands in ``pilotfish --help``."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from typer.core import TyperGroup

# Tasks under which commands are listed; a command names one as its ``rich_help_panel``.
SERVING = "Serve a model"
TUNING = "Prepare a model"
SEARCH = "Search documents and answer questions"
MEASURING = "Measure"
TASKS = (SERVING, TUNING, SEARCH, MEASURING)


class GroupedCommands(TyperGroup):
    """A command group whose help lists its commands by task, in plain text."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each task; commands of third parties without a task come last."""
        sections: dict[str, list[tuple[str, Any]]] = {task: [] for task in TASKS}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            task = getattr(command, "rich_help_panel", None)
            sections.setdefault(task if isinstance(task, str) else "Other commands", []).append((name, command))
        width = max((len(name) for commands in sections.values() for name, _ in commands), default=0)
        for task, commands in sections.items():
            if commands:
                limit = formatter.width - 6 - width
                with formatter.section(task):
                    formatter.write_dl([(name.ljust(width), c.get_short_help_str(limit)) for name, c in commands])


def make_table(*headers: str, numbers: Iterable[str] = (), title: str | None = None) -> Table:
    """Make a table that stays readable at 80 columns.

    Args:
        headers: Column headers; a header of numbers has one word per line, to keep the column narrow.
        numbers: The headers of columns that hold numbers: right-aligned, and never wrapped.
        title: Title above the table.
    """
    numeric = set(numbers)
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for header in headers:
        if header in numeric:
            table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
        else:
            table.add_column(header, overflow="fold")  # text that is cut off cannot be copied
    return table


def print_plain(*objects: RenderableType) -> None:
    """Print tables and text to standard output, separated by empty lines; their strings are not parsed as markup."""
    console = Console(markup=False, emoji=False)
    for number, item in enumerate(objects):
        if number:
            console.print()
        console.print(item)


def format_number(value: float) -> str:
    """Return a number with four significant digits, and with all digits before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
