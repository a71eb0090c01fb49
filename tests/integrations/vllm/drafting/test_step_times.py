"""The batch-size latency profile: measured at the first starts, keeping the minimum for each size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish.integrations.vllm.drafting import step_times


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Redirect the file of step times, with a single rank."""
    alone = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value: value)
    monkeypatch.setattr(step_times, "get_tp_group", lambda: alone)
    monkeypatch.setattr(step_times, "_path", lambda *_: tmp_path / "steps.json")
    return tmp_path / "steps.json"


def start_times(monkeypatch: pytest.MonkeyPatch, seconds: float, most: int = 4) -> dict[int, float] | None:
    """Return the step times of one start where a query token takes ``seconds``; None if nothing was measured."""
    measured: list[Any] = []

    def measure(_: Any, sizes: list[int]) -> dict[int, float]:
        measured.append(sizes)
        return {n: seconds * n for n in sizes}

    monkeypatch.setattr(step_times, "measure_step_times", measure)
    times = step_times._times(SimpleNamespace(), SimpleNamespace(), most)  # type: ignore[arg-type]
    return times if measured else None


def test_keeps_the_minimum_of_three_starts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0}
    assert start_times(monkeypatch, 2.0) == slow
    assert start_times(monkeypatch, 1.0) == {n: t / 2 for n, t in slow.items()}
    assert start_times(monkeypatch, 3.0) == {n: t / 2 for n, t in slow.items()}, "the minimum of each size is kept"
    assert start_times(monkeypatch, 0.5) is None, "only the first three starts measure"
    known = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert start_times(monkeypatch, 30.0, most=6) == {**known, 6: 6.0}, "a new size, on a busy machine"
    assert start_times(monkeypatch, 1.5, most=6) == {**known, 6: 6.0}, "a new size is measured at three starts too"
    assert start_times(monkeypatch, 0.9, most=6) == {**known, 6: 0.9 * 6}
    assert start_times(monkeypatch, 0.5, most=6) is None
    old = '{"times": {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}, "starts": 4}'  # a count for all sizes together
    negative = '{"times": {"1": -1}, "starts": {"1": 3}}'
    for damaged in ("", "[]", '{"1": 0.01}', '{"times": {"1": "x"}, "starts": {"1": 3}}', negative, old):
        file.write_text(damaged)
        assert start_times(monkeypatch, 2.0) == slow, damaged


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (1e9, step_times.REPEATS + 1)])
def test_repeats_until_time_is_up(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    monkeypatch.setattr(step_times, "get_tp_group", lambda: SimpleNamespace(broadcast_object=lambda value: value))
    monkeypatch.setattr(step_times, "SECONDS", seconds)
    ran: list[int] = []

    def run(n: int, skip_eplb: bool) -> tuple[torch.Tensor, None]:
        ran.append(n)
        return torch.zeros(n, 4), None

    model = SimpleNamespace(compute_logits=lambda hidden: torch.zeros(len(hidden), 16))
    times = step_times.measure_step_times(SimpleNamespace(model=model, _dummy_run=run), [1, 2, 3])
    assert ran == [1, 2, 3] * rounds
    assert all(t > 0 for t in times.values())
