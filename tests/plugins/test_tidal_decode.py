"""Tests of TidalDecode: its options, the selection of its layers, and its decode step."""

from pathlib import Path

import numpy as np
import pytest

from pilotfish.kvcache import profiles
from pilotfish.kvcache.profiles import Profile
from pilotfish.kvcache.reference import attention
from pilotfish.kvcache.selection import Role
from pilotfish.plugins.config import ConfigError, build_options
from pilotfish.plugins.contracts import Engine, Unsupported
from pilotfish.plugins.tidal_decode import TidalDecode, TidalDecodeOptions, evenly_spaced_layers, resolve_layers

ENGINE = Engine("m", 1000, 8192, 8, layers=12, fingerprint="f")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget: expected 1 to"),
        ({"budget": 100}, "budget: expected a multiple of 32"),
        ({"budget": 128, "recent": 128}, "budget: expected at least"),
        ({"sinks": -1}, "sinks: expected 0 to"),
        ({"select_layers": [3, 3]}, "select_layers: expected layer numbers in ascending order"),
        ({"select_layers": [-1]}, "select_layers: expected layer numbers"),
        ({"select_layers": []}, "select_layers: expected at least one"),
        ({"full_layers": [0]}, "full_layers: given without select_layers"),
        ({"select_layers": [2], "profile": "fast"}, "profile: given together with select_layers"),
        ({"window_layers": [1]}, "window_layers: given without select_layers"),
        ({"select_layers": [2], "window_layers": [2]}, "layer 2 is in full_layers or select_layers too"),
        ({"select_layers": [2], "window_layers": [4, 3]}, "window_layers: expected layer numbers in ascending order"),
        (
            {"select_layers": [2], "window_layers": [3], "budget": 64, "recent": 0, "granularity": "token"},
            "budget: expected at least 128 with window_layers",
        ),
        ({"select_layers": [2], "window": 128}, "window: given without window_layers"),
        ({"window": 130}, "window: expected a multiple of 32"),
        ({"window": 1024}, "window: expected at most the budget, 512"),
        (
            {"select_layers": [2], "window_layers": [3], "window": 64},
            "window: expected at least 128 with window_layers, got 64",
        ),
        ({"candidates": 1024}, "candidates: given without select=two_pass"),
        ({"select": "two_pass", "candidates": 1000}, "candidates: expected a multiple of 32"),
        ({"select": "two_pass", "candidates": 512}, "candidates: expected at least 544"),
        (
            {"select": "two_pass", "budget": 1152, "recent": 1024, "candidates": 1152},
            "candidates: expected at least 1184",
        ),
        ({"head_aggregation": "mean"}, "head_aggregation: expected one of"),
        ({"correction_interval": -1}, "correction_interval: expected 0 to"),
    ],
)
def test_refuses_options_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_options(TidalDecodeOptions, values, "pilotfish.kv")


def test_layer_roles_follow_the_options() -> None:
    plan = TidalDecode(TidalDecodeOptions(full_layers=(0, 1), select_layers=(2, 7)), ENGINE).read_plan()
    assert [i for i, role in enumerate(plan.roles) if role is Role.FULL] == [0, 1]
    assert [i for i, role in enumerate(plan.roles) if role is Role.SELECT] == [2, 7]
    assert len(plan.roles) == 12
    assert plan.rule.recent == 64


@pytest.mark.parametrize("budget", [16, 32, 100, 500])
def test_candidates_hold_what_is_always_kept_and_more_than_the_budget(budget: int) -> None:
    options = TidalDecodeOptions(budget=budget, granularity="token", select="two_pass")
    rule = options.rule
    assert rule.candidates % 32 == 0
    assert rule.candidates - 32 >= budget, "also if the last page has one token"
    assert rule.candidate_rule.min_budget <= rule.candidates


def test_a_window_without_window_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="window: no layer is a window layer"):
        resolve_layers(TidalDecodeOptions(window=256), ENGINE)


def test_window_layers_have_a_role() -> None:
    options = TidalDecodeOptions(select_layers=(2, 7), window_layers=(0, 1, 4))
    plan = TidalDecode(options, ENGINE).read_plan()
    assert [i for i, role in enumerate(plan.roles) if role is Role.WINDOW] == [0, 1, 4]
    assert [i for i, role in enumerate(plan.roles) if role is Role.SPARSE] == [3, 5, 6, 8, 9, 10, 11]
    TidalDecode.check(options, ENGINE)
    only_windows = TidalDecodeOptions(select_layers=(10,), window_layers=(11,))
    with pytest.raises(Unsupported, match="no layer would attend to the selected tokens"):
        TidalDecode.check(only_windows, ENGINE)
    hybrid = Engine("m", 1000, 8192, 8, layers=12, full_attention_layers=(3, 7, 11))
    with pytest.raises(Unsupported, match="layer 5: window_layers names it"):
        TidalDecode.check(TidalDecodeOptions(select_layers=(3,), window_layers=(5,)), hybrid)


@pytest.mark.parametrize("context", [129, 160, 300, 321])
def test_window_layers_read_the_first_and_the_latest_pages(context: int) -> None:
    rng = np.random.default_rng(context)
    options = TidalDecodeOptions(budget=128, recent=0, select_layers=(1,), window_layers=(0, 2))
    policy = TidalDecode(options, Engine("m", 1000, 8192, 8, layers=4, fingerprint="f"))
    queries = rng.normal(size=(4, 2, 8))
    keys, values = rng.normal(size=(2, 4, context, 1, 8))
    outputs = policy.decode_step(list(queries), list(keys), list(values), 0.5)
    pages = -(-context // 32)
    positions = [t for t in range(context) if t < 32 or t // 32 > pages - 4]
    for layer in (0, 2):
        for head in range(2):
            weights = np.exp(keys[layer, positions, 0] @ queries[layer, head] * 0.5)
            expected = weights @ values[layer, positions, 0] / weights.sum()
            np.testing.assert_allclose(outputs[layer][head], expected)


def test_untuned_model_gets_evenly_spaced_layers() -> None:
    assert resolve_layers(TidalDecodeOptions(), ENGINE) == ((0, 1), (2, 5, 8, 11), ())
    for layers in range(1, 100):
        full, select, _ = evenly_spaced_layers(range(layers))
        assert select
        assert max(full + select) < layers


@pytest.mark.parametrize(
    ("name", "layers", "attending"),
    [
        ("Gemma 3, 12B", 48, range(5, 48, 6)),
        ("Gemma 3, 27B", 62, range(5, 62, 6)),
        ("gpt-oss, 20B", 24, range(1, 24, 2)),
        ("Qwen3-Next", 48, range(3, 48, 4)),
        ("Llama 4", 48, range(3, 48, 4)),
        ("Gemma 3, 4B", 34, range(5, 34, 6)),
        ("Gemma 3, 1B", 26, range(5, 26, 6)),
        ("three layers", 12, range(3, 12, 4)),
        ("two layers", 12, range(5, 12, 6)),
    ],
)
def test_layers_of_hybrid_models_are_those_with_full_attention(name: str, layers: int, attending: range) -> None:
    engine = Engine(name, 1000, 8192, 8, layers=layers, full_attention_layers=tuple(attending))
    full, select, _ = resolve_layers(TidalDecodeOptions(), engine)
    assert {*full, *select} < set(attending)
    sparse = [layer for layer in attending if layer not in {*full, *select}]
    assert any(layer > select[0] for layer in sparse)
    TidalDecode.check(TidalDecodeOptions(), engine)


def test_refuses_layers_without_full_attention_and_names_the_others() -> None:
    engine = Engine("m", 1000, 8192, 8, layers=12, full_attention_layers=(3, 7, 11))
    with pytest.raises(Unsupported, match=r"layer 2: select_layers names it.* choose select_layers among 3, 7, 11"):
        TidalDecode.check(TidalDecodeOptions(select_layers=(2,)), engine)
    TidalDecode.check(TidalDecodeOptions(select_layers=(3,)), engine)


@pytest.mark.parametrize(
    ("layers", "attending", "options"),
    [
        (12, (), TidalDecodeOptions()),
        (12, (5,), TidalDecodeOptions()),
        (12, (5, 11), TidalDecodeOptions(select_layers=(11,))),
        (1, None, TidalDecodeOptions()),
        (12, None, TidalDecodeOptions(select_layers=(11,))),
    ],
)
def test_refuses_models_on_which_no_layer_would_be_sparse(layers, attending, options) -> None:
    with pytest.raises(
        Unsupported, match=r"no layer (would attend to the selected tokens|of the model attends to all tokens)"
    ):
        TidalDecode.check(options, Engine("m", 1000, 8192, 8, layers=layers, full_attention_layers=attending))


def test_layers_come_from_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    settings = {
        "default": {"full_layers": [0], "select_layers": [1, 5]},
        "fast": {"full_layers": [], "select_layers": [0], "window_layers": [2]},
    }
    profiles.write_profile(path, Profile("tidal_decode", "m", "f", settings))
    assert resolve_layers(TidalDecodeOptions(profile=str(path)), ENGINE) == ((0,), (1, 5), ())
    assert resolve_layers(TidalDecodeOptions(profile=f"{path}#fast"), ENGINE) == ((), (0,), (2,))
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        resolve_layers(TidalDecodeOptions(profile=f"{path}#fats"), ENGINE)
    other = Engine("other", 1000, 8192, 8, layers=12, fingerprint="g")
    with pytest.raises(Unsupported, match="is of the model m; run `pilotfish tune tidal`"):
        TidalDecode.check(TidalDecodeOptions(profile=str(path)), other)
    with pytest.raises(Unsupported, match="no profile is shipped"):
        TidalDecode.check(TidalDecodeOptions(profile="fast"), other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9, "policy": "a", "model": "b"}'])
def test_refuses_invalid_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"pilotfish\.kv\.profile: .*not a profile"):
        resolve_layers(TidalDecodeOptions(profile=str(path)), ENGINE)
    with pytest.raises(ConfigError, match="No such file"):
        resolve_layers(TidalDecodeOptions(profile=str(tmp_path / "none.json")), ENGINE)


def test_refuses_profile_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profiles.write_profile(path, Profile("tidal_decode", "m", "f", {}))
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match="of version 2, expected 1"):
        resolve_layers(TidalDecodeOptions(profile=str(path)), ENGINE)


def test_refuses_layers_that_the_model_does_not_have() -> None:
    with pytest.raises(
        Unsupported, match=r"model m, layer 12: select_layers names it, but the model has layers 0 to 11"
    ):
        TidalDecode.check(TidalDecodeOptions(select_layers=(2, 12)), ENGINE)


def test_refuses_machine_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unsupported, match=r"need a C\+\+ compiler; install g\+\+"):
        TidalDecode.check(TidalDecodeOptions(), ENGINE)


@pytest.mark.parametrize(
    "setting",
    [{}, {"full_layers": "ab", "select_layers": [1]}, {"full_layers": None, "select_layers": [1]}]
    + [{"select_layers": [1], "window_layers": 2}, {"select_layers": [1], "window_layers": [1]}]
    + [{"full_layers": [], "select_layers": layers} for layers in ([], [-3], ["a"])],
)
def test_refuses_profile_settings_without_layers(tmp_path: Path, setting: dict) -> None:
    path = tmp_path / "p.json"
    profiles.write_profile(path, Profile("tidal_decode", "m", "f", {"default": setting}))
    with pytest.raises(ConfigError, match=r"profile: (full|select|window)_layers"):
        resolve_layers(TidalDecodeOptions(profile=str(path)), ENGINE)


def test_sparse_layers_read_what_the_last_selection_layer_selected() -> None:
    """Test the whole decode step (algorithm 1) against loops over heads and tokens."""
    rng = np.random.default_rng(0)
    layers, heads, kv_heads, size, context = 6, 4, 2, 8, 90
    engine = Engine("m", 1000, 8192, 8, layers=layers, fingerprint="f")
    options = TidalDecodeOptions(
        budget=16,
        sinks=2,
        recent=3,
        granularity="token",
        head_aggregation="sum",
        full_layers=(0,),
        select_layers=(1, 4),
    )
    policy = TidalDecode(options, engine)
    queries = rng.normal(size=(layers, heads, size)) * 2
    keys, values = rng.normal(size=(2, layers, context, kv_heads, size))

    def attend(layer: int, head: int, positions: list[int]) -> np.ndarray:
        kv_head = head // (heads // kv_heads)
        logits = [float(queries[layer, head] @ keys[layer, t, kv_head]) * 0.4 for t in positions]
        weights = np.exp(np.array(logits) - max(logits))
        return sum(w * values[layer, t, kv_head] for w, t in zip(weights, positions, strict=True)) / weights.sum()

    def select(layer: int) -> list[int]:
        total = np.zeros(context)
        for head in range(heads):
            logits = np.array([queries[layer, head] @ keys[layer, t, head // 2] * 0.4 for t in range(context)])
            total += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        always = {0, 1, *range(context - 4, context)}
        others = sorted(set(range(context)) - always, key=lambda t: -total[t])
        return sorted(always | set(others[: 16 - len(always)]))

    all_positions = list(range(context))
    reads = [all_positions, all_positions, select(1), select(1), all_positions, select(4)]
    outputs = policy.decode_step(list(queries), list(keys), list(values), 0.4)
    for layer in range(layers):
        expected = np.stack([attend(layer, head, reads[layer]) for head in range(heads)])
        np.testing.assert_allclose(outputs[layer], expected, rtol=1e-9, err_msg=f"layer {layer}")
    assert not np.allclose(outputs[2], np.stack([attend(2, head, all_positions) for head in range(heads)]))


def test_context_within_the_budget_uses_full_attention() -> None:
    rng = np.random.default_rng(1)
    engine = Engine("m", 1000, 8192, 8, layers=3, fingerprint="f")
    policy = TidalDecode(TidalDecodeOptions(budget=128, full_layers=(), select_layers=(0,)), engine)
    queries = list(rng.normal(size=(3, 2, 4)))
    keys, values = (list(x) for x in rng.normal(size=(2, 3, 128, 1, 4)))
    outputs = policy.decode_step(queries, keys, values, 0.5)
    for layer, output in enumerate(outputs):
        np.testing.assert_allclose(output, attention(queries[layer], keys[layer], values[layer], 0.5)[1])
