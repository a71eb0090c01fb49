"""A command: `pilotfish kv-size FOLDER` prints the size of a model's KV cache."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pilotfish import hookimpl


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("kv-size")(kv_size)


def kv_size(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, with its config.json.")],
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens.")] = 1024,
    bytes_per_value: Annotated[int, typer.Option(min=1, help="Size of a key or value element: 2 for bfloat16.")] = 2,
) -> None:
    """Print the size of a model's KV cache for a number of tokens."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        # An exception of typer becomes one line on standard error, and exit code 2.
        raise typer.BadParameter(f"{folder}: no configuration of a decoder model ({error!r})") from None
    typer.echo(f"{per_token * bytes_per_value * tokens / 2**20:.1f} MiB for {tokens} tokens")
