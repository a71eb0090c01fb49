"""Engines whose workers are forked from a process that has imported vLLM: each starts about ten seconds sooner."""

import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pilotfish.integrations.vllm.bench.engine import ENVIRONMENT, EngineProcess

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pilotfish.integrations.vllm.bench.engine",
        "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.llm",
        "vllm.model_executor.models.llama",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
    ]
)


def start_process(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that has imported vLLM already."""
    with patch.dict(os.environ, {**ENVIRONMENT, **os.environ}):
        multiprocessing.forkserver.ensure_running()  # vLLM reads some variables when it is imported
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


class ForkedProcess:
    """The part of `subprocess.Popen` that `EngineProcess` uses."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        commands, stdin = CONTEXT.Pipe(duplex=False)
        stdout, answers = CONTEXT.Pipe(duplex=False)
        self._process = start_process(run_worker, arguments, environment, commands, answers, log)
        self.stdin, self.stdout = as_file(stdin, "w"), as_file(stdout, "r")
        commands.close()
        answers.close()  # the worker has the only other end, so that the end of the worker is the end of the file
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._process.exitcode


class ForkedEngineProcess(EngineProcess):
    """Client of a forked worker. Not for workers with another release of vLLM, or with Triton's interpreter."""

    def _spawn(self, arguments: Sequence[str], environment: dict[str, str]) -> Any:
        return ForkedProcess(arguments, environment, self.log)


def as_file(connection: Connection, mode: str) -> Any:
    """Return a text file of the same pipe as a connection, which is closed."""
    file = os.fdopen(os.dup(connection.fileno()), mode)
    connection.close()
    return file


def run_worker(
    arguments: Sequence[str], environment: dict[str, str], commands: Connection, answers: Connection, log: Path
) -> None:
    """Run a Python script in this forked process, with the standard streams of a process that was started for it."""
    os.setsid()
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor, source in enumerate((commands.fileno(), answers.fileno(), errors)):
        os.dup2(source, descriptor)
    commands.close()
    answers.close()
    os.close(errors)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    logger = logging.getLogger("vllm")  # was configured when vLLM was imported
    for leveled in (logger, *logger.handlers):
        leveled.setLevel(environment["VLLM_LOGGING_LEVEL"])
    gc.freeze()  # vLLM collects several times at start; imported modules need no look
    script, *sys.argv[1:] = arguments
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
