"""Logging: the ``vllm.pilotfish`` logger, the start-up table, and one-line errors under vLLM's command line."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError
from ....plugins.contracts import Unsupported
from ....plugins.manager import plugins
from . import vllm_api
from .selection import Attachment, attach

logger = logging.getLogger("vllm.pilotfish")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Under vLLM's command line, turn our refusals into one line on standard error and exit code 2.

    A program that embeds vLLM gets the exception itself.
    """
    try:
        yield
    except (ConfigError, Unsupported) as error:
        if not _under_command_line():
            raise
        print(f"pilotfish: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise SystemExit(2) from None


def _under_command_line() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm.entrypoints"))


def announce_pruner(vllm_config: Any) -> None:
    """Say in a worker's log which pruner its model has."""
    attachment = attach("pruner", vllm_config)
    if attachment is None:
        return
    how = "between projector and language model"
    if (schedule := attachment.cls(attachment.options).layer_schedule()) is not None:
        how += f"; EXPERIMENTAL: and inside it, layers {schedule.first} to {schedule.last}"
    logger.info("%s", start_up_table("pruner", attachment, how))


def start_up_table(kind: str, attachment: Attachment, how: str) -> str:
    """What is attached and ``how``, as one log message."""
    engine = attachment.engine
    lines = [
        f"pilotfish: {kind} {attachment.name} selected",
        f"  origin     {plugins().origin(attachment.cls)}",
        f"  options    {attachment.options}",
        f"  engine     {engine.model}, {engine.layers} layers, vocabulary {engine.vocab_size}, {engine.device}, "
        f"{engine.dtype}",
        f"  attached   {how}",
        f"  seams      {len(vllm_api.REQUIRED_APIS)} checked against vLLM {vllm_api.installed_version()}",
    ]
    return "\n".join(lines)
