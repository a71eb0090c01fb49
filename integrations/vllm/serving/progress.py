"""Progress bars of the command line, on standard error."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..models import base

console = Console(stderr=True)


def fetch_with_bar(model: base.LocalModel) -> Path:
    """Fetch an embedded model with a progress bar of the bytes written."""
    if model.fetched:
        return model.folder
    model.check_source()  # raises before the bar is shown
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as bar:
        task = bar.add_task(f"making {model.name}", total=None)
        return base.fetch_model(model, lambda done, total: bar.update(task, completed=done, total=total))


def counting_bar() -> Progress:
    """Return a progress bar with a count and the remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
