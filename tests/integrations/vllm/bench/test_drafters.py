"""Summary metrics of the drafter benchmark, against values computed by hand."""

import json
from pathlib import Path

import pytest

from pilotfish.integrations.bench import record
from pilotfish.integrations.vllm.bench.drafters import STOCK, DrafterRun, summarize_runs


def make_run(
    arm: str,
    turn: int,
    seconds: float,
    tokens: list[int],
    steps: int,
    category: str = "qa",
    batch: int = 1,
    again: bool = False,
) -> DrafterRun:
    """Return a run with the given time, output and number of steps."""
    answer = {
        "tokens": [tokens] * batch,
        "seconds": seconds,
        "decode_seconds": seconds / 2,
        "request_steps": steps,
        "emitted": len(tokens) - 1,
        "drafted": 2 * steps,
        "proposing": {"seconds": 0.001 * steps, "requests": steps} if arm != STOCK else {},
    }
    return DrafterRun(arm, "data", category, batch, turn, again, answer)


def test_summary_metrics() -> None:
    stock = f"{STOCK}|tr"
    runs = [
        make_run(stock, 0, 2.0, [1, 2, 3, 4, 5], 4),
        make_run("tr@cold", 0, 1.0, [1, 2, 3, 4, 5], 2),
        make_run(stock, 1, 4.0, [1, 2, 3, 4, 5], 4, "math"),
        make_run("tr@cold", 1, 2.0, [1, 2, 3, 4, 9], 4, "math"),
    ]
    figures = {(r.dataset, r.metric): r for r in summarize_runs(runs)}
    assert figures["data", "speedup"].value == pytest.approx(2.0)
    assert figures["data", "speedup"].runs == [2.0, 2.0]
    assert figures["data", "identical_share"].value == 0.5
    assert figures["data", "acceptance_length"].value == pytest.approx(8 / 6, abs=1e-3)
    assert figures["data/qa", "acceptance_length"].value == 2.0
    assert figures["data/math", "identical_share"].value == 0.0
    assert figures["data", "proposal_ms"].value == pytest.approx(1.0)
    assert figures["data", "drafted_per_step"].value == 2.0
    assert {r.arm for r in figures.values()} == {"tr@cold"}


def test_repeated_prompts_are_reported_separately() -> None:
    stock, arm = f"{STOCK}|rasd@verification=tree", "rasd@verification=tree"
    runs = [
        make_run(stock, 0, 2.0, [1, 2, 3, 4, 5], 4),
        make_run(arm, 0, 1.0, [1, 2, 3, 4, 5], 2),
        make_run(stock, 0, 2.0, [1, 2, 3, 4, 5], 4, again=True),
        make_run(arm, 0, 0.25, [1, 2, 3, 4, 5], 1, again=True),
    ]
    figures = {(r.dataset, r.metric): r.value for r in summarize_runs(runs)}
    assert figures["data", "speedup"] == pytest.approx(2.0)
    assert figures["data_again", "speedup"] == pytest.approx(8.0)
    assert figures["data_twice", "speedup"] == pytest.approx(4.0)
    assert figures["data_again/qa", "acceptance_length"] == 4.0


def test_result_file_is_complete_and_contains_no_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pilotfish", "bench", "--out", str(Path.home() / "x.json"), str(Path.cwd() / "y")])
    path = tmp_path / "deep" / "result.json"
    record.write_records(path, [record.Record("drafters", "d", "a", "speedup", 1.5, "x", [1.0], {"batch": 1})])
    result = json.loads(path.read_text())
    assert set(result) == {"machine", "versions", "command", "date", "records"}
    assert result["command"] == "pilotfish bench --out '~/x.json' ./y"
    assert result["records"][0]["runs"] == [1.0]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
