import time
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.drafting import state_saver
from pilotfish.integrations.vllm.drafting.state_saver import StateSaver


class Recorder:
    """Fake drafter that counts its saves, and fails if ``fail`` is set."""

    def __init__(self, fail: bool = False) -> None:
        self.saves, self.fail = 0, fail

    def save(self, path: Path) -> None:
        self.saves += 1
        if self.fail:
            raise OSError("disk full")
        path.write_text(str(self.saves))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the intervals of the saver."""
    monkeypatch.setattr(state_saver, "IDLE", 0.05)
    monkeypatch.setattr(state_saver, "EVERY", 0.2)


def wait_until(condition, seconds: float = 60) -> bool:
    """Wait until ``condition`` holds; returns whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_saves_when_idle_and_only_after_changes(tmp_path: Path) -> None:
    drafter = Recorder()
    saver = StateSaver(drafter, tmp_path / "s")  # type: ignore[arg-type]
    time.sleep(0.3)
    assert drafter.saves == 0
    saver.touch()
    assert wait_until(lambda: drafter.saves == 1)
    time.sleep(0.3)
    assert drafter.saves == 1
    saver.close()
    assert drafter.saves == 1


def test_saves_under_load_and_on_close(tmp_path: Path) -> None:
    drafter = Recorder()
    saver = StateSaver(drafter, tmp_path / "s")  # type: ignore[arg-type]
    start = time.monotonic()
    while time.monotonic() < start + 0.6 or not drafter.saves:
        saver.touch()
        time.sleep(0.005)
    assert drafter.saves <= (time.monotonic() - start) / state_saver.EVERY + 1
    saver.touch()
    before = drafter.saves
    saver.close()
    assert drafter.saves == before + 1


def test_retries_after_a_failed_save(tmp_path: Path) -> None:
    drafter = Recorder(fail=True)
    saver = StateSaver(drafter, tmp_path / "s")  # type: ignore[arg-type]
    saver.touch()
    assert wait_until(lambda: drafter.saves >= 1)
    assert wait_until(lambda: drafter.saves >= 2), "the thread keeps running, and saves again"
    saver.close()
