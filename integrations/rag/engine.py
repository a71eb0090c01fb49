"""A vLLM server with chosen plugins, for as long as a command runs."""

import contextlib
import os
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
        server = subprocess.Popen([*command, *arguments], stdout=output, stderr=output, start_new_session=True)
        try:
            _await(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(server)


def _await(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            told = next((line for line in lines if line.startswith("pilotfish: ")), lines[-1] if lines else "no word")
            raise ConfigError(f"the server ended before it answered: {told.removeprefix('pilotfish: ')}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise ConfigError(f"the server did not answer within {PATIENCE} seconds; its output is in {log}")


def _end(server: subprocess.Popen) -> None:
    """As by Ctrl-C; what does not end is killed."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
