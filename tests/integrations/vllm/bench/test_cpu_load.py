"""Tests of the number of threads beside other processes."""

import psutil
import pytest

from pilotfish.integrations.vllm.bench import cpu_load


@pytest.mark.parametrize(
    ("percent", "threads"), [(0, None), (5, None), (10, 3), (25, 3), (30, 3), (50, 2), (75, 1), (100, 1)]
)
def test_engines_leave_the_cores_that_others_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, percent: float, threads: int | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _: percent)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1, 2, 3])
    assert cpu_load.threads_beside_others() == threads
    assert ("times are unreliable" in caplog.text) == (threads is not None)


def test_a_number_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(psutil, "cpu_percent", lambda _: 100)
    assert cpu_load.threads_beside_others() is None
