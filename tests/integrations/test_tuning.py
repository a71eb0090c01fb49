"""From tried sets of layers to a profile, without an engine."""

from pathlib import Path

import pytest

from pilotfish.integrations.vllm.tuning import Plan, Tried, to_profile
from pilotfish.kvcache.layer_choice import LayerChoice

PLAN = Plan("m", None, 512, 4000, 48, 12, 0.08, 0.25, 0.02, "bfloat16", Path("p.json"))


def tried(kls: list[float], needles: list[float] | None = None) -> list[Tried]:
    shares = needles or [1.0] * len(kls)
    return [
        Tried(LayerChoice((), tuple(range(n + 1)), 0.0), kl, 0.9, share)
        for n, (kl, share) in enumerate(zip(kls, shares, strict=True))
    ]


def test_the_fewest_layers_that_meet_the_target_are_taken() -> None:
    profile = to_profile(PLAN, "f", 1.0, tried([0.9, 0.2, 0.1, 0.05, 0.01]))
    assert profile.settings["fast"]["select_layers"] == [0, 1]
    assert profile.settings["default"]["select_layers"] == [0, 1, 2, 3]
    assert [row["kl"] for row in profile.evidence["curve"]] == [0.9, 0.2, 0.1, 0.05, 0.01]


def test_a_target_out_of_reach_takes_the_closest_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    profile = to_profile(PLAN, "f", 1.0, tried([0.9, 0.2, 0.3]))
    assert profile.settings["default"]["select_layers"] == [0, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "default: no set of layers stays below 0.08 and finds the needles; 0.200 is the least" in said


def test_a_set_that_loses_needles_is_passed_over() -> None:
    profile = to_profile(PLAN, "f", 0.9, tried([0.2, 0.1, 0.05, 0.01], [0.5, 0.89, 0.7, 0.9]))
    assert profile.settings["default"]["select_layers"] == [0, 1, 2, 3]
    assert profile.settings["fast"]["select_layers"] == [0], "fast promises speed, not needles"


def test_tune_refuses_bad_input(cli, tmp_path: Path) -> None:
    for arguments, message in (
        (("./no",), "no such folder"),
        (("smollm2-135m-instruct", "--text", str(tmp_path / "none.txt")), "No such file"),
        (("smollm2-135m-instruct", "--budget", "100"), "multiple of 32"),
        (("smollm2-135m-instruct", "--out", str(tmp_path / "no" / "p.json")), "not a file in a folder that exists"),
    ):
        answer = cli("tune", "tidal", *arguments)
        assert answer.returncode == 2, answer
        assert message in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
