"""Resident and peak memory of processes."""

import threading
from pathlib import Path

EVERY = 0.005  # seconds between samples


def status(what: str, process: int | str = "self") -> float | None:
    """Return memory of a Linux process in MiB: resident (``VmRSS``) or its peak (``VmHWM``); None if unavailable."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what)), None)


def resident() -> float:
    """Return the resident memory of this process in MiB; 0 if unavailable."""
    return status("VmRSS") or 0.0


def of_all(process: int) -> float:
    """Return the resident memory in MiB of a process and its descendants, 0 for those that ended."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return 0.0
    return (status("VmRSS", process) or 0.0) + sum(of_all(child) for child in children)


class PeakMemory:
    """Context manager that samples memory: ``mib`` is the peak of resident memory above its value at entry, in MiB.

    It is a lower bound: memory that the process had allocated and freed before is reused without an increase.
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
