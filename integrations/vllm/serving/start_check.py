"""Check of a composed `vllm serve` command: vLLM configures the engine and builds the layers, without weights."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ....plugins.config import ConfigError
from ....plugins.contracts import Unsupported
from .command import ServeCommand


def check_before_print(command: ServeCommand) -> None:
    """Check a command as vLLM would at start, before it is printed.

    Commands without plugins or with a remote model are not checked.

    Raises:
        ConfigError: vLLM refuses the command.
        Unsupported: A plugin refuses the model or the engine's settings.
    """
    if "--additional-config" in command.options and Path(command.folder).is_dir():
        check_start(command)


def check_start(command: ServeCommand) -> None:
    """Check what `vllm serve` checks before it loads the weights.

    It takes seconds, since vLLM is imported. Not checked: the kernels' self-tests, the layers of a model that cannot be
    built on the meta device, and the sharding over tensor-parallel ranks.

    Args:
        command: Command whose model is a local folder.

    Raises:
        ConfigError: vLLM refuses the command.
        Unsupported: A plugin refuses the model or the engine's settings.
    """
    with _without_output():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = ServeSubcommand().subparser_init(FlexibleArgumentParser(prog="vllm").add_subparsers())
        parser.error = _refuse
        try:
            arguments = parser.parse_args(["--model", command.folder, *command.options])
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
        except (ConfigError, Unsupported):
            raise
        except Exception as error:  # vLLM raises errors of many types
            _refuse(_reason(error))
        _check_layers(config)


def _check_layers(vllm_config: Any) -> None:
    """Build the model on the meta device, and check its attention layers."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from ..attention.layer_checks import check_attention_layers

    with set_current_vllm_config(vllm_config):
        try:
            _build_model(vllm_config)
        except (ConfigError, Unsupported):
            raise
        except Exception as error:  # the model needs real tensors: its layers are checked at start
            logging.getLogger("vllm.pilotfish").debug("layers not checked: %s", error)
            return
        layers = vllm_config.compilation_config.static_forward_context
        check_attention_layers(vllm_config, {n: layer for n, layer in layers.items() if isinstance(layer, Attention)})


def _build_model(vllm_config: Any) -> None:
    import torch
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.init_distributed_environment(1, 0, local_rank=0, backend="gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    vllm_config.compilation_config.static_forward_context.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(vllm_config.model_config.dtype)
    try:
        with torch.device("meta"):
            initialize_model(vllm_config)
    finally:
        torch.set_default_dtype(before)


def _refuse(reason: str) -> NoReturn:
    raise ConfigError(f"vLLM refuses the command: {reason}")


def _reason(error: Exception) -> str:
    """Return the message of an error in one line; of pydantic's, without its address and input."""
    messages = [e["msg"] for e in error.errors()] if hasattr(error, "errors") else [str(error)]  # type: ignore[attr-defined]
    return " ".join("; ".join(messages).split()) or type(error).__name__


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Discard what vLLM and its libraries print and log: the reason of a refusal is raised."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
            stream.flush()
            os.dup2(saved[number - 1], number)
            os.close(saved[number - 1])
        os.close(nowhere)
