"""Progress bars of the command line, on standard error."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..models import base

console = Console(stderr=True)


def fetch_with_bar(model: base.LocalModel) -> Path:
    """Fetch an embedded model, showing the bytes written."""
    if model.fetched:
        return model.folder
    model.check_source()  # refuse before a bar is drawn
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as bar:
        task = bar.add_task(f"making {model.name}", total=None)
        return base.fetch_model(model, lambda done, total: bar.update(task, completed=done, total=total))


def counting_bar() -> Progress:
    """A bar that counts things, with the time that remains."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
