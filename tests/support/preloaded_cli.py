"""Runs `pilotfish` in processes that are forked from one that has imported vLLM already.

Importing vLLM takes ten to twenty seconds of processor time. Each command still has its own process, environment and
output; a test of what a command imports needs a real one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from forked_engine import start_process


def _run(arguments: tuple[str, ...], environment: dict[str, str], out: str, error: str) -> None:
    for number, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["pilotfish", *arguments]
    from pilotfish.__main__ import main

    main()


def run_preloaded(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, and return its exit status and output.

    Raises:
        subprocess.TimeoutExpired: It took longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        out.touch()
        error.touch()
        variables = {**os.environ, "COLUMNS": "160", **environment}
        process = start_process(_run, arguments, variables, str(out), str(error))
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["pilotfish", *arguments], timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), error.read_text())
