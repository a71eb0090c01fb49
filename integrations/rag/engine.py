"""A vLLM server with chosen plugins, for as long as a command runs."""

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

PATIENCE = 600  # seconds until a server answers: large models load for minutes
END = 30  # seconds for it to end
# vLLM's CPU build takes nearly all memory for its cache otherwise, and ends where that is not free.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2"}
_ERROR = re.compile(r"\b[A-Z]\w+(?:Error|Exception): .+")


@dataclass(frozen=True)
class Server:
    """A process that answers.

    Attributes:
        url: Without a path.
        pid: Of the process.
    """

    url: str
    pid: int


@contextlib.contextmanager
def running_server(words: Sequence[str], arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[Server]:
    """Run a command of `pilotfish` that serves, on a free port of this machine; it is there once it answers.

    It is ended with all its processes.

    Args:
        words: The command and what it serves: ``serve MODEL``, ``rag serve INDEX``.
        arguments: Further ones, behind its address.
        log: Where its output goes; a temporary file without.

    Raises:
        ConfigError: it ended before it answered, with its last line.
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
    """Run `pilotfish serve`; gives the URL of its API.

    Args:
        model: A folder, a hub name or the name of an embedded model.
        arguments: Further ones of `pilotfish serve` and of vLLM.
        log: See `running`.

    Raises:
        ConfigError: see `running`.
    """
    # How many of a prompt's tokens were cached, in each answer.
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
    """What ended a server: our own refusal, or the first error, from which others follow."""
    lines = [line for line in log.splitlines() if line.strip()]
    refusal = next((line.removeprefix("pilotfish: ") for line in lines if line.startswith("pilotfish: ")), None)
    error = next((found[0] for line in lines if (found := _ERROR.search(line))), None)
    return refusal or error or (lines[-1] if lines else "it said nothing")


def _end(server: subprocess.Popen) -> None:
    """As by Ctrl-C; what does not end is killed."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
