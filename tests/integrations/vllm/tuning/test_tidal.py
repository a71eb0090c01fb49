"""Tuning of TidalDecode without an engine: from measured sets of layers to a profile."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pilotfish.integrations.vllm.bench.kv_worker import MissedAttention
from pilotfish.integrations.vllm.tuning.tidal import (
    LayerTrial,
    TidalTuning,
    candidates,
    layers_of,
    only_window_layer,
    to_profile,
    window_layers,
)
from pilotfish.kvcache import reference
from pilotfish.kvcache.kernels.paged_decode import DecodeBatch
from pilotfish.kvcache.layer_choice import LayerChoice, best_layer_choices
from pilotfish.kvcache.selection import Role, SelectionRule
from pilotfish.plugins.config import build_options
from pilotfish.plugins.contracts import Engine
from pilotfish.plugins.tidal_decode import TidalDecode, TidalDecodeOptions

PLAN = TidalTuning("m", None, 512, 4000, 48, 12, 0.08, 0.25, 0.02, "bfloat16", Path("p.json"))


def layer_trials(kls: list[float], needles: list[float] | None = None) -> list[LayerTrial]:
    """Return a trial for each KL divergence, with one more layer each."""
    shares = needles or [1.0] * len(kls)
    return [
        LayerTrial(LayerChoice((), tuple(range(n + 1)), 0.0), kl, 0.9, share)
        for n, (kl, share) in enumerate(zip(kls, shares, strict=True))
    ]


def test_profile_takes_the_fewest_layers_that_meet_the_target() -> None:
    profile = to_profile(PLAN, "f", 1.0, layer_trials([0.9, 0.2, 0.1, 0.05, 0.01]))
    assert profile.settings["fast"]["select_layers"] == [0, 1]
    assert profile.settings["default"]["select_layers"] == [0, 1, 2, 3]
    assert [row["kl"] for row in profile.evidence["curve"]] == [0.9, 0.2, 0.1, 0.05, 0.01]


def test_unreachable_target_takes_the_closest_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    profile = to_profile(PLAN, "f", 1.0, layer_trials([0.9, 0.2, 0.3]))
    assert profile.settings["default"]["select_layers"] == [0, 1]
    stderr = " ".join(capsys.readouterr().err.split())
    assert "default: no set of layers stays below 0.08 and finds the needles; the least is 0.200" in stderr


def test_sets_below_the_needle_target_are_skipped() -> None:
    profile = to_profile(PLAN, "f", 0.9, layer_trials([0.2, 0.1, 0.05, 0.01], [0.5, 0.89, 0.7, 0.9]))
    assert profile.settings["default"]["select_layers"] == [0, 1, 2, 3]
    assert profile.settings["fast"]["select_layers"] == [0], "fast has no needle target"


def test_tune_tidal_refuses_bad_input(cli, inside, tmp_path: Path) -> None:
    for arguments, message in (
        (("./no",), "no such folder"),
        (("smollm2-135m-instruct", "--text", str(tmp_path / "none.txt")), "No such file"),
        (("smollm2-135m-instruct", "--default-kl", "nan"), "expected a number from 0"),
        (("smollm2-135m-instruct", "--budget", "100"), "multiple of 32"),
        (("smollm2-135m-instruct", "--context", "9000"), "has 8192 positions"),
        (
            ("smollm2-135m-instruct", "--out", str(tmp_path / "no" / "p.json")),
            "not a .json file in a folder",
        ),
    ):
        answer = (cli if message == "no such folder" else inside)("tune", "tidal", *arguments)
        assert answer.returncode == 2, answer
        assert message in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_missed_attention_matches_reference_for_all_positions_and_for_a_span() -> None:
    rng = np.random.default_rng(0)
    heads, contexts, layers = 3, [300, 257], 2
    rule = SelectionRule(budget=160, sinks=4, recent=32, head_aggregation="max", granularity="page")
    rows = DecodeBatch([1, 0], [0, 1], contexts, heads)
    scores = [torch.from_numpy(rng.normal(0, 3, (2, heads, rows.padded)).astype(np.float32)) for _ in range(layers)]
    for spans in (None, {1: (40, 90), 0: (100, 130)}):
        observer = MissedAttention(layers, rule, (spans or {}).get)
        copies = [s.clone() for s in scores]
        for s in scores:
            observer(rows, s)
        assert all(torch.equal(s, before) for s, before in zip(scores, copies, strict=True)), (
            "the observer does not modify the scores"
        )
        assert observer.steps == 1
        expected = np.zeros((layers, layers))
        for row, context in enumerate(contexts):
            row_scores = [s[row, :, :context].double().numpy() for s in scores]
            weights = [reference.softmax(s) for s in row_scores]
            begin, end = spans[rows.request[row]] if spans else (0, context)
            for selecting in range(layers):
                selected = TidalDecode.select_tokens(TidalDecode.token_scores(row_scores[selecting], rule, 1)[0], rule)
                missed = np.ones(context, bool)
                missed[selected] = False
                missed[:begin] = missed[end:] = False
                for reading in range(layers):
                    expected[selecting, reading] += (weights[reading][:, missed].sum(-1) ** 2).mean() / len(contexts)
        np.testing.assert_allclose(observer.mean.numpy(), expected, atol=1e-5)


def test_layers_with_next_to_no_divergence_become_window_layers() -> None:
    assert window_layers(dict(enumerate([0.02, 0.004, 0.5, 0.0, 0.3])), 0.05) == (1, 3)
    assert window_layers(dict(enumerate([0.0] * 6)), 0.05) == (0, 1, 2), "three layers are left"
    assert window_layers(dict(enumerate([0.0] * 3)), 0.05) == ()


def test_only_measured_layers_become_window_layers() -> None:
    assert window_layers({5: 0.0, 11: 0.0, 17: 0.0, 23: 0.5}, 0.05) == (5,)


def test_candidates_leave_window_layers_out() -> None:
    missed = np.triu(np.random.default_rng(2).random((9, 9)), 1)
    window = (0, 1, 4)
    choices = candidates(missed, missed, most=4, window=window)
    assert all(c.window == window and not {*c.full, *c.select} & {*window} for c in choices)
    others = [2, 3, 5, 6, 7, 8]
    expected = best_layer_choices(missed[np.ix_(others, others)], most=4)
    assert {c.select for c in choices} == {tuple(others[n] for n in c.select) for c in expected}
    for choice in choices:
        options = build_options(TidalDecodeOptions, {"budget": 128, **layers_of(choice)}, "pilotfish.kv")
        assert options.window_layers == window
    assert "window_layers" not in layers_of(LayerChoice((0,), (1,), 0.0))


def test_one_layer_alone_is_a_window_layer() -> None:
    for layer in range(4):
        options = build_options(TidalDecodeOptions, only_window_layer(layer, 4, 128), "pilotfish.kv")
        roles = TidalDecode(options, Engine("m", 1000, 8192, 8, layers=4)).read_plan().roles
        assert [n for n, role in enumerate(roles) if role is Role.WINDOW] == [layer]
        assert Role.SPARSE not in roles


def test_candidates_include_the_best_sets_for_text_and_for_needles() -> None:
    rng = np.random.default_rng(1)
    text_losses, needle_losses = (np.triu(rng.random((8, 8)), 1) for _ in range(2))
    choices = candidates(text_losses, 1000 * needle_losses, most=4)
    sets = {(c.full, c.select) for c in choices}
    assert len(sets) == len(choices)
    assert [c.num_full_layers for c in choices] == sorted(c.num_full_layers for c in choices)
    for losses in (text_losses, needle_losses):
        assert {(c.full, c.select) for c in best_layer_choices(losses, 4)} <= sets
    assert sets == {(c.full, c.select) for c in candidates(text_losses, needle_losses, most=4)}, (
        "scaling does not matter"
    )


def test_tune_razor_refuses_bad_input(inside, tmp_path: Path) -> None:
    for arguments, message in (
        (("./no",), "no such folder"),
        (("smollm2-135m-instruct", "--out", str(tmp_path)), "--out"),
        (("smollm2-135m-instruct", "--plot", str(tmp_path / "no" / "p.png")), "--plot"),
        (("smollm2-135m-instruct", "--max-tokens", "3"), "--max-tokens"),
    ):
        answer = inside("tune", "razor", *arguments)
        assert answer.returncode == 2, answer
        assert message in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
