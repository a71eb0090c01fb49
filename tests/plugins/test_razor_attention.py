"""Tests of RazorAttention's options and of the selection of retrieval heads."""

from pathlib import Path

import pytest

from pilotfish.kvcache import profiles
from pilotfish.kvcache.profiles import Profile
from pilotfish.plugins.config import ConfigError, build_options
from pilotfish.plugins.contracts import Engine, Unsupported
from pilotfish.plugins.razor_attention import RazorAttention, RazorAttentionOptions, resolve_retrieval_heads

ENGINE = Engine("m", 1000, 8192, 8, layers=4, kv_heads=2, fingerprint="f")
SCORES = {"echo": [[0.0, 0.0]] * 3 + [[0.9, 0.0]], "induction": [[0.1, 0.2], [0.8, 0.0], [0.3, 0.7], [0.0, 0.0]]}


def options(**values) -> RazorAttentionOptions:
    return build_options(RazorAttentionOptions, values, "pilotfish.kv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, "keep: expected a share above 0"),
        ({"keep": 1.5}, "keep: expected a share"),
        ({"keep": []}, "keep: expected pairs"),
        ({"keep": [[1]]}, "keep: expected pairs"),
        ({"keep": [[1, -1]]}, "keep: expected pairs"),
        ({"keep": [[1, 1]], "profile": "p.json"}, "profile: given together with heads"),
        ({"keep": "all"}, "keep: expected"),
        ({"window": 0}, "window: expected 1 to"),
        ({"ratio": -1}, "ratio: expected 0 to"),
        ({"sinks": -1}, "sinks: expected 0 to"),
        ({"prefill": "lazy"}, "prefill: expected one of 'exact', 'streaming'"),
        ({"windows": 512}, "windows: unknown, did you mean 'window'"),
    ],
)
def test_refuses_options_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**values)


def test_retrieval_heads_come_from_options_or_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profiles.write_profile(path, Profile("razor_attention", "m", "f", {"default": SCORES}))
    assert resolve_retrieval_heads(options(keep=[[1, 1], [3, 0]]), ENGINE) == [(1, 1), (3, 0)]
    assert resolve_retrieval_heads(options(keep=0.25, profile=str(path)), ENGINE)[:2] == [(3, 0), (1, 0)]
    assert set(resolve_retrieval_heads(options(keep=0.25, profile=str(path), protect_layers=1), ENGINE)) >= {
        (0, 0),
        (0, 1),
        (1, 0),
    }
    plan = RazorAttention(options(keep=[[1, 1], [3, 0]], window=64), ENGINE).head_plan()
    assert plan.retrieval_heads == (frozenset(), frozenset({1}), frozenset(), frozenset({0}))
    assert plan.window.window == 64


def test_refuses_heads_and_profiles_of_other_models(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profiles.write_profile(path, Profile("razor_attention", "m", "f", {"default": SCORES}))
    other = Engine("other", 1000, 8192, 8, layers=4, kv_heads=2, fingerprint="g")
    with pytest.raises(Unsupported, match="is of the model m; run `pilotfish tune razor`"):
        RazorAttention.check(options(profile=str(path)), other)
    with pytest.raises(Unsupported, match="no profile of its heads is shipped"):
        RazorAttention.check(options(), other)
    with pytest.raises(Unsupported, match="layer 9: keep names its head 0, but the model has layers 0 to 3"):
        RazorAttention.check(options(keep=[[9, 0]]), ENGINE)


def test_shipped_profile_fits_the_embedded_model() -> None:
    (path,) = profiles.SHIPPED.glob("razor_attention-smollm2*.json")
    scores = profiles.read_profile(path).settings["default"]
    assert (len(scores["echo"]), len(scores["echo"][0])) == (30, 3)
    kept = resolve_retrieval_heads(options(profile=str(path)), Engine("m", 1, 1, 1, layers=30, kv_heads=3))
    assert len(kept) == 15
    assert kept[0] == (18, 2)


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"echo": [[0, 0]], "induction": [[0, 0]]},
        {**SCORES, "echo": [[0], [1, 2], [0], [0]]},
        {**SCORES, "echo": None},
    ],
)
def test_refuses_scores_of_wrong_shape(tmp_path: Path, scores: dict) -> None:
    path = tmp_path / "p.json"
    profiles.write_profile(path, Profile("razor_attention", "m", "f", {"default": scores}))
    with pytest.raises(ConfigError, match="expected as 4 lists of 2 numbers"):
        resolve_retrieval_heads(options(profile=str(path)), ENGINE)
