"""Keeps a drafter's state on disk while the engine runs.

vLLM's server ends its workers at once unless told otherwise (`--shutdown-timeout` is 0 by default), so saving at
shutdown is not enough. A thread saves when the engine has fallen idle, and now and then under load.
"""

import logging
import threading
import time
from pathlib import Path

from ....plugins.contracts import Drafter

logger = logging.getLogger("vllm.pilotfish")

IDLE = 1.0  # seconds without a step after which the engine counts as idle
EVERY = 60.0  # seconds between saves of an engine that is never idle


class StateSaver:
    """Saves ``drafter`` to ``path`` whenever it has learned something and the moment is good.

    Saving while another thread learns is harmless: a row half written is a bad draft at worst, and drafts are verified.
    """

    def __init__(self, drafter: Drafter, path: Path) -> None:
        self._drafter, self._path = drafter, path
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._touched = self._saved = time.monotonic()
        self._failing = False  # an error is logged once, not every second
        self._thread = threading.Thread(target=self._run, name="pilotfish-state", daemon=True)
        self._thread.start()

    def touch(self) -> None:
        """The drafter has learned from a step."""
        self._touched = time.monotonic()

    def close(self) -> None:
        """Save what is new, and stop."""
        self._stop.set()
        self._save()

    def _run(self) -> None:
        while not self._stop.wait(IDLE / 2):
            now = time.monotonic()
            if now - self._touched >= IDLE or now - self._saved >= EVERY:
                self._save()

    def _save(self) -> None:
        """Save if there is news; a full disk must not take the server down."""
        with self._lock:
            if self._touched <= self._saved:
                return
            before, self._saved = self._saved, time.monotonic()
            try:
                self._drafter.save(self._path)
            except Exception as error:  # whatever it is, serving goes on; the next quiet moment tries again
                self._saved = before
                if not self._failing:
                    logger.error("pilotfish: the drafter's state could not be written: %s", error)
                self._failing = True
            else:
                self._failing = False
