"""Times of steps: measured at the first starts, the least of each size kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pilotfish.integrations.vllm.drafting import step_times


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept; one rank."""
    alone = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value: value)
    monkeypatch.setattr(step_times, "get_tp_group", lambda: alone)
    monkeypatch.setattr(step_times, "_path", lambda *_: tmp_path / "steps.json")
    return tmp_path / "steps.json"


def starts(monkeypatch: pytest.MonkeyPatch, seconds: float, most: int = 4) -> dict[int, float] | None:
    """What one start goes by on a machine of that speed; None where it did not measure."""
    measured: list[Any] = []

    def measure(_: Any, sizes: list[int]) -> dict[int, float]:
        measured.append(sizes)
        return {n: seconds * n for n in sizes}

    monkeypatch.setattr(step_times, "measure_step_times", measure)
    found = step_times._times(SimpleNamespace(), SimpleNamespace(), most)  # type: ignore[arg-type]
    return found if measured else None


def test_a_busy_start_is_not_believed_for_ever(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0}
    assert starts(monkeypatch, 2.0) == slow
    assert starts(monkeypatch, 1.0) == {n: t / 2 for n, t in slow.items()}
    assert starts(monkeypatch, 3.0) == {n: t / 2 for n, t in slow.items()}, "the least of each"
    assert starts(monkeypatch, 0.5) is None, "three starts are enough"
    assert starts(monkeypatch, 1.5, most=6) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 6: 9.0}, "a size that was not known"
    for damaged in ("", "[]", '{"1": 0.01}', '{"times": {"1": "x"}, "starts": 3}', '{"times": {"1": -1}, "starts": 3}'):
        file.write_text(damaged)
        assert starts(monkeypatch, 2.0) == slow, damaged
