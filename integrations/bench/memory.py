"""How much memory something takes while it is done."""

import threading
from pathlib import Path

EVERY = 0.005  # seconds


def status(what: str, process: int | str = "self") -> float | None:
    """MiB of a process as Linux has it: ``VmRSS`` in memory, ``VmHWM`` that ever were; None where it does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what)), None)


def resident() -> float:
    """MiB of this process that are in memory; 0 where the system does not tell."""
    return status("VmRSS") or 0.0


def of_all(process: int) -> float:
    """MiB of a process and of those that it started that are in memory; of those that are there still."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return 0.0
    return (status("VmRSS", process) or 0.0) + sum(of_all(child) for child in children)


class PeakMemory:
    """Looks while a block runs: ``mib`` is then the most that was resident, beyond what was before it.

    Memory that the process had free already is not counted; so it is a lower bound where much was done before.
    """

    mib = 0.0

    def __enter__(self) -> "PeakMemory":
        self._before, self._ended = resident(), threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._looking.join()

    def _look(self) -> None:
        while True:
            ended = self._ended.wait(EVERY)
            self.mib = max(self.mib, resident() - self._before)
            if ended:
                return
