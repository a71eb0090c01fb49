"""Background thread that saves a drafter's state to disk while the engine runs.

vLLM's server kills its workers at shutdown by default (`--shutdown-timeout` is 0), so saving at shutdown is not enough.
The thread saves when the engine becomes idle, and periodically under load.
"""

import logging
import threading
import time
from pathlib import Path

from ....plugins.contracts import DeviceDrafter, Drafter

logger = logging.getLogger("vllm.pilotfish")

IDLE = 1.0  # seconds without a step after which the engine counts as idle
EVERY = 60.0  # seconds between saves while the engine is never idle


class StateSaver:
    """Background saver of a drafter's state.

    Saving while the drafter learns in another thread is harmless: a partly written row yields at worst a bad draft,
    which verification rejects.

    Args:
        drafter: The drafter.
        path: File of the state.
    """

    def __init__(self, drafter: Drafter | DeviceDrafter, path: Path) -> None:
        self._drafter, self._path = drafter, path
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._touched = self._saved = time.monotonic()
        self._failing = False  # an error is logged once, not every second
        self._thread = threading.Thread(target=self._run, name="pilotfish-state", daemon=True)
        self._thread.start()

    def touch(self) -> None:
        """Record that the drafter has learned from a step."""
        self._touched = time.monotonic()

    def close(self) -> None:
        """Save unsaved state and stop the thread."""
        self._stop.set()
        self._save()

    def _run(self) -> None:
        while not self._stop.wait(IDLE / 2):
            now = time.monotonic()
            if now - self._touched >= IDLE or now - self._saved >= EVERY:
                self._save()

    def _save(self) -> None:
        """Save if the state has changed; errors such as a full disk must not stop the server."""
        with self._lock:
            if self._touched <= self._saved:
                return
            before, self._saved = self._saved, time.monotonic()
            try:
                self._drafter.save(self._path)
            except Exception as error:  # serving continues; the thread tries again when the engine is next idle
                self._saved = before
                if not self._failing:
                    logger.error("pilotfish: the drafter's state could not be written: %s", error)
                self._failing = True
            else:
                self._failing = False
