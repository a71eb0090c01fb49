"""A stock engine that is asked the same by several tests."""

import json
from collections.abc import Callable
from typing import Any

from pilotfish.integrations.vllm.bench.engine import EngineProcess


class StockEngine:
    """A stock engine that starts when a question is new in this session: it answers a repeated one the same."""

    def __init__(self, start: Callable[[], EngineProcess], answers: dict[str, Any]) -> None:
        self._start, self._answers = start, answers
        self._engine: EngineProcess | None = None

    def ask(self, **command: Any) -> dict[str, Any]:
        key = json.dumps(command)
        if key not in self._answers:
            if self._engine is None:
                self._engine = self._start()
            self._answers[key] = self._engine.ask(**command)
        return self._answers[key]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
