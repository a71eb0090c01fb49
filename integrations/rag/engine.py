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
from pathlib import Path

import httpx

from ...plugins.config import ConfigError

PATIENCE = 600  # seconds until a server answers: large models load for minutes
END = 30  # seconds for it to end
# vLLM's CPU build takes nearly all memory for its cache otherwise, and ends where that is not free.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2"}
_ERROR = re.compile(r"\b[A-Z]\w+(?:Error|Exception): .+")


@contextlib.contextmanager
def started(model: str, arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[str]:
    """Run `pilotfish serve`; gives the URL of its API once it answers, and ends it with all its processes.

    Args:
        model: A folder, a hub name or the name of an embedded model.
        arguments: Further ones of `pilotfish serve` and of vLLM.
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
        command = [sys.executable, "-m", "pilotfish", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--enable-prompt-tokens-details"]  # how many of a prompt's tokens were cached, in each answer
        server = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**ENVIRONMENT, **os.environ},
        )
        try:
            _await(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(server)


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
