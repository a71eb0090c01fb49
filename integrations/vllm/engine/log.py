"""Logging: the ``vllm.pilotfish`` logger, the start-up table, and one-line errors for vLLM's command line."""

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
    """Print our errors as one line on standard error and exit with code 2, if vLLM's command line is running.

    In a program that embeds vLLM the exception propagates.
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
    """Log the pruner of the model in a worker; no effect if none is selected."""
    attachment = attach("pruner", vllm_config)
    if attachment is None:
        return
    how = "between projector and language model"
    if (schedule := attachment.cls(attachment.options).layer_schedule()) is not None:
        how += f"; EXPERIMENTAL: also inside the language model, layers {schedule.first} to {schedule.last}"
    logger.info("%s", start_up_table("pruner", attachment, how))


def start_up_table(kind: str, attachment: Attachment, how: str) -> str:
    """Return a log message that describes an attached plugin.

    Args:
        kind: Plugin type.
        attachment: The attached plugin.
        how: Where and how the plugin is attached.
    """
    engine = attachment.engine
    lines = [
        f"pilotfish: {kind} {attachment.name} selected",
        f"  origin     {plugins().origin(attachment.cls)}",
        f"  options    {attachment.options}",
        f"  engine     {engine.model}, {engine.layers} layers, vocabulary {engine.vocab_size}, {engine.device}, "
        f"{engine.dtype}",
        f"  attached   {how}",
        f"  vLLM APIs  {len(vllm_api.REQUIRED_APIS)} checked against vLLM {vllm_api.installed_version()}",
    ]
    return "\n".join(lines)
