"""A vLLM server with selected plugins, started for the duration of a command."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ...plugins.config import ConfigError

PATIENCE = 600  # timeout until a server answers, in seconds: large models load for minutes
END = 30  # timeout until a server ends, in seconds
# Otherwise vLLM's CPU build takes nearly all memory for its KV cache, and fails if that is not free.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2"}
_ERROR = re.compile(r"\b[A-Z]\w+(?:Error|Exception): .+")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: URL without a path.
        pid: Process id.
    """

    url: str
    pid: int


@contextlib.contextmanager
def running_server(words: Sequence[str], arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[Server]:
    """Run a server command of `pilotfish` on a free local port, and wait until it answers.

    At exit the server and all of its child processes are ended.

    Args:
        words: Command and its object, such as ``serve MODEL`` or ``rag serve INDEX``.
        arguments: Further arguments, after host and port.
        log: File for the output of the server; a temporary file if not given.

    Raises:
        ConfigError: The server ended before it answered, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        if log is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        output = stack.enter_context(log.open("wb"))
        command = [sys.executable, "-m", "pilotfish", *words, "--host", "127.0.0.1", "--port", str(port), *arguments]
        environment = {**ENVIRONMENT, **os.environ}
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
        try:
            _await(server, f"http://127.0.0.1:{port}", log)
            yield Server(f"http://127.0.0.1:{port}", server.pid)
        finally:
            _end(server)


@contextlib.contextmanager
def started_server(model: str, arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[str]:
    """Run `pilotfish serve`, and yield the URL of its API.

    Args:
        model: Folder, hub name, or name of an embedded model.
        arguments: Further arguments of `pilotfish serve` and vLLM.
        log: File for the output of the server, see `running_server`.

    Raises:
        ConfigError: The server cannot be started, see `running_server`.
    """
    # The option adds the number of cached prompt tokens to each answer.
    with running_server(["serve", model], ["--enable-prompt-tokens-details", *arguments], log) as server:
        yield f"{server.url}/v1"


def _await(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"the server ended before it answered: {_cause(log.read_text(errors='replace'))}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise ConfigError(f"the server did not answer within {PATIENCE} seconds; its output is in {log}")


def _cause(log: str) -> str:
    """Return why a server ended: Pilotfish's own message, else the first error in its log, else the last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    refusal = next((line.removeprefix("pilotfish: ") for line in lines if line.startswith("pilotfish: ")), None)
    error = next((match[0] for line in lines if (match := _ERROR.search(line))), None)
    return refusal or error or (lines[-1] if lines else "its log is empty")


def _end(server: subprocess.Popen) -> None:
    """Interrupt a server, and kill the processes that do not end in time."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
