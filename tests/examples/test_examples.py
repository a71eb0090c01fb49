"""Tests of the example packages, which are installed with pip and loaded through their entry points."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from growing import Text
from refusals import refused

from pilotfish.plugins import hookspecs
from pilotfish.plugins.contracts import DraftBudget, DraftRequest, Engine, ImageFeatures, ImageLayout, Unsupported
from pilotfish.plugins.manager import HOOKS, PluginManager, plugins

MODEL = "smollm2-135m-instruct"
# Plugin type, name, and names of the options of each example that registers a class.
EXAMPLES = [
    ("drafter", "repeat_last", ["confidence"]),
    ("pruner", "token_correlation", ["retain", "similar", "repeats"]),
    ("kv", "local_global", ["every", "window", "sinks"]),
    ("index", "binary_vectors", ["center"]),
    ("encoder", "char_trigrams", []),
]
FISH = [
    {"id": "shark", "text": "The whale shark is the largest fish in the sea.", "metadata": {"year": 2019}},
    {"id": "pilot", "text": "Pilot fish travel with sharks and eat their parasites.", "metadata": {"year": 2021}},
    {"id": "tax", "text": "Income tax returns are due in April.", "metadata": {"year": 2022}},
]


@pytest.fixture(scope="session")
def install(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that installs examples, each into its own folder, and returns a value for PYTHONPATH."""
    folders: dict[str, str] = {}

    def installed(*names: str) -> str:
        for name in names:
            if name not in folders:
                folders[name] = str(tmp_path_factory.mktemp(name))
                options = ("-q", "--no-deps", "--no-build-isolation", "--target", folders[name])
                command = [sys.executable, "-m", "pip", "install", *options, str(root / "examples" / name)]
                subprocess.run(command, check=True, capture_output=True, timeout=200)
        return os.pathsep.join(folders[name] for name in names)

    return installed


@pytest.fixture
def load(install: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Any]]:
    """Return a function that registers an example through its entry point and returns the registered class."""
    manager = plugins()
    loaded: list[str] = []

    def register(kind: str, name: str) -> Any:
        monkeypatch.syspath_prepend(install(f"{kind}_{name}"))
        (point,) = entry_points(group="pilotfish", name=name)
        manager.register(point.load(), point.name)
        loaded.append(point.name)
        return manager.get(kind, name)

    yield register
    for name in loaded:
        manager.unregister(name)


def test_every_hook_has_an_example(root: Path) -> None:
    kinds = {path.parent.name.partition("_")[0] for path in (root / "examples").glob("*/pyproject.toml")}
    assert kinds == {*HOOKS, "command"}
    assert {kind for kind, _, _ in EXAMPLES} == set(HOOKS)
    hooks = {name for name in vars(hookspecs) if name.startswith("register_")}
    assert hooks == {*HOOKS.values(), "register_commands"}, "a new hook needs an example"


@pytest.mark.parametrize(("kind", "name", "options"), EXAMPLES)
def test_example_is_listed_with_its_options(
    cli: Callable, install: Callable, kind: str, name: str, options: list
) -> None:
    listed = json.loads(cli("plugins", "--json", PYTHONPATH=install(f"{kind}_{name}")).stdout)
    (plugin,) = [p for p in listed["plugins"] if p["name"] == name]
    assert (plugin["kind"], plugin["origin"]) == (kind, name)
    assert plugin["summary"].endswith(".")
    assert [o["name"] for o in plugin["options"]] == options
    assert all(o["help"] for o in plugin["options"])
    assert listed["failed"] == []
    if name == "repeat_last":
        assert plugin["options"] == [
            {
                "name": "confidence",
                "type": "float",
                "default": 0.6,
                "help": "Estimated probability that a draft token is accepted.",
            }
        ]


def test_example_is_not_listed_unless_installed(inside: Callable) -> None:
    listed = {p["name"] for p in json.loads(inside("plugins", "--json").stdout)["plugins"]}
    assert not listed & {name for _, name, _ in EXAMPLES}


@pytest.mark.parametrize(
    ("kind", "name", "written", "nearest"),
    [
        ("drafter", "repeat_last", "confidense", "confidence"),
        ("pruner", "token_correlation", "similarity", "similar"),
        ("kv", "local_global", "windows", "window"),
    ],
)
def test_refuses_unknown_options(
    inside: Callable, load: Callable, kind: str, name: str, written: str, nearest: str
) -> None:
    load(kind, name)
    refused = inside("serve", MODEL, f"--{kind}", f"{name},{written}=0.5", "--print")
    assert refused.returncode == 2
    assert f"pilotfish.{kind}.{written}: unknown, did you mean '{nearest}'?" in refused.stderr


def test_broken_plugin_fails_only_if_selected(preloaded_cli: Callable, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pilotfish]\nbroken = broken_module\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('out of order')\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    assert preloaded_cli("serve", MODEL, "--drafter", "token_recycling", "--print", **environment).returncode == 0
    selected = preloaded_cli("serve", MODEL, "--drafter", "broken", "--print", **environment)
    assert selected.returncode == 2
    assert "broken (RuntimeError: out of order)" in selected.stderr
    doctor = preloaded_cli("doctor", **environment)
    assert doctor.returncode == 1
    assert "plugin broken failed to load: RuntimeError: out of order" in doctor.stdout


# ------------------------------------------------------------------------------------------------------------- drafter


def test_drafter_is_selected_and_its_options_are_checked(preloaded_cli: Callable, install: Callable) -> None:
    path = install("drafter_repeat_last")
    selected = preloaded_cli("serve", MODEL, "--drafter", "repeat_last,confidence=0.5", "--print", PYTHONPATH=path)
    assert '"name": "repeat_last", "confidence": 0.5' in selected.stdout
    bad = preloaded_cli("serve", MODEL, "--drafter", "repeat_last,confidence=2", "--print", PYTHONPATH=path)
    assert bad.returncode == 2
    assert "pilotfish.drafter.confidence: expected between 0 and 1, got 2.0" in bad.stderr


def test_drafter_copies_the_continuation_of_a_repeat(load: Callable) -> None:
    cls = load("drafter", "repeat_last")
    drafter = cls(cls.Options(), Engine("m", 10, 100, 1))
    text = np.array([1, 2, 3, 4, 1, 2], np.int32)
    (tree,) = drafter.propose([DraftRequest("r", text, 3)], DraftBudget(8, 8))
    assert tree.tokens.tolist() == [3, 4, 1]
    assert len(drafter.propose([DraftRequest("r", text[:2], 3)], DraftBudget(8, 8))[0]) == 0


# -------------------------------------------------------------------------------------------------------------- pruner


@pytest.mark.slow
def test_pruner_is_used_by_prune_command(preloaded_cli: Callable, install: Callable, tmp_path: Path) -> None:
    from PIL import Image

    path = install("pruner_token_correlation")
    Image.effect_noise((400, 300), 60).convert("RGB").save(tmp_path / "noise.png")
    arguments = ("prune", str(tmp_path / "noise.png"), "--pruner", "token_correlation,retain=0.5")
    answer = preloaded_cli(*arguments, "--out", str(tmp_path / "out"), PYTHONPATH=path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out" / "noise-token-correlation-retain-0-5.png").exists()
    assert preloaded_cli(*arguments).returncode == 2, "the pruner does not exist without its package"
    serve = ("serve", MODEL, "--pruner", "token_correlation,similar=0.9", "--print")
    refused(preloaded_cli(*serve, PYTHONPATH=path), "token_correlation does not support", "it takes no images")


def test_repeated_tokens_of_a_crop_are_pruned_first(load: Callable) -> None:
    import torch

    cls = load("pruner", "token_correlation")
    layout = ImageLayout(6, (1, 2), (0, 6, 0, 12), (6, 12), row_newlines=True)
    tokens = torch.randn(layout.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    grid = tokens[36:].view(6, 13, 16)
    grid[:, :6] = 1.0  # all tokens of the first crop are equal
    pruner = cls(cls.Options(0.25))
    plan = pruner.plan(layout)
    features = ImageFeatures(tokens, torch.rand(3, 36, generator=torch.Generator().manual_seed(1)))
    kept = pruner.select(layout, plan, features)
    assert len(kept) == plan.num_tokens
    assert torch.equal(pruner.apply(layout, plan, features), tokens[kept])
    columns = [int(i - 36) % 13 for i in kept if i >= 36]
    assert sum(c < 6 for c in columns) == 0
    assert sum(6 <= c < 12 for c in columns) == 18


# ----------------------------------------------------------------------------------------------------------- KV policy

ENGINE = Engine("m", 1000, 8192, 8, layers=6, kv_heads=2)


def test_policy_is_selected_and_its_options_are_checked(preloaded_cli: Callable, install: Callable) -> None:
    path = install("kv_local_global")
    selected = preloaded_cli("serve", MODEL, "--kv", "local_global,window=512,every=3", "--print", PYTHONPATH=path)
    assert '"kv": {"name": "local_global", "window": 512, "every": 3}' in selected.stdout
    assert "--no-enable-prefix-caching" in selected.stdout, "it frees blocks"
    bad = preloaded_cli("serve", MODEL, "--kv", "local_global,every=1", "--print", PYTHONPATH=path)
    assert bad.returncode == 2
    assert "pilotfish.kv.every: expected 2 or more, got 1" in bad.stderr


def test_policy_refuses_model_with_too_few_layers(load: Callable) -> None:
    cls = load("kv", "local_global")
    cls.check(cls.Options(every=5), ENGINE)
    with pytest.raises(Unsupported, match="local_global does not support model m: every=6, but it has 6 layers"):
        cls.check(cls.Options(every=6), ENGINE)


def test_policy_plans_global_layers_and_windows(load: Callable) -> None:
    cls = load("kv", "local_global")
    plan = cls(cls.Options(every=3, window=70, sinks=5), ENGINE).head_plan()
    assert plan.retrieval_heads == ({0, 1}, set(), set(), {0, 1}, set(), set())
    block = 32
    for position in range(600):
        # Token by token: a block is evicted if none of its tokens is a sink or among the last 70.
        needed = {p // block for p in range(position) if p < 5 or p >= position - 70}
        evicted = block * len(set(range(position // block)) - needed)
        assert plan.window.num_evicted(position, block) == evicted
        assert plan.window.num_evicted(position, block, in_prompt=True) == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_kernels_match_naive_attention_of_the_policy(load: Callable, layer: int) -> None:
    """Test that global layers attend to all tokens, and local layers to sinks and window only."""
    import torch

    cls = load("kv", "local_global")
    plan = cls(cls.Options(every=3, window=70, sinks=5), ENGINE).head_plan()
    windowed = [head not in plan.retrieval_heads[layer] for head in range(ENGINE.kv_heads)]
    prompt, end = 400, 420
    text = Text([end], windowed, 2, 32, 32, torch.float32, plan.window, seed=0)
    text.step([0], [prompt], prompt)
    for position in range(prompt, end):
        (query,), (output,) = text.step([position], [position + 1])
        first_block = (position - 70) // 32
        keep = [p for p in range(position + 1) if layer == 0 or p < 32 or p // 32 >= first_block]
        for head in range(4):
            key, value = (x[0][keep, head // 2] for x in (text.keys, text.values))
            weights = torch.softmax(key @ query[0, head] * 32**-0.5, 0)
            torch.testing.assert_close(output[0, head], weights @ value, atol=3e-5, rtol=0)


def test_policy_gets_full_and_windowed_cache_specs(load: Callable) -> None:
    """Test the KV cache specs that vLLM gets for this plan, without an engine."""
    import torch

    pytest.importorskip("vllm")
    from pilotfish.integrations.vllm.attention.windowed import kv_cache_spec

    cls = load("kv", "local_global")
    plan = cls(cls.Options(every=3, window=70, sinks=5), ENGINE).head_plan()
    layers = [
        SimpleNamespace(
            layer_name=f"layer{i}", num_kv_heads=2, head_size=64, kv_cache_torch_dtype=torch.float32, impl=None
        )
        for i in range(ENGINE.layers)
    ]
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(max_model_len=2048),
        max_in_flight_tokens=256,
    )
    heads = kv_cache_spec.split_into_heads(layers, {}, plan.retrieval_heads, plan.window)
    for i, of_layer in enumerate(heads):
        for head in of_layer:
            spec = head.get_kv_cache_spec(config)
            assert type(spec).__name__ == ("WindowedHeadSpec" if i % 3 else "FullAttentionSpec")
            if i % 3:
                assert spec.max_decode_blocks * 32 < 256 < spec.max_blocks * 32, "a prompt attends to all its tokens"


# --------------------------------------------------------------------------------------------- index type and encoder


@pytest.fixture
def documents(tmp_path: Path) -> str:
    path = tmp_path / "fish.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in FISH))
    return str(path)


@pytest.mark.parametrize("kind", ["dense", "binary_vectors"])
def test_index_uses_the_encoder(cli: Callable, install: Callable, tmp_path: Path, documents: str, kind: str) -> None:
    """Test both examples in one command, and the encoder with a built-in index type."""
    environment = {"PYTHONPATH": install("encoder_char_trigrams", "index_binary_vectors")}
    folder = str(tmp_path / "index")
    built = cli("index", "build", folder, documents, "--kind", kind, "--encoder", "char_trigrams", **environment)
    assert built.returncode == 0, built.stderr
    search = ("index", "search", folder, "pilto fishes", "-k", "2", "--json")  # with a typo
    hits = json.loads(cli(*search, **environment).stdout)["hits"]
    assert len(hits) == 2
    assert hits[0]["id"] == "pilot"
    hits = json.loads(cli(*search, "--where", "year != 2021", **environment).stdout)["hits"]
    assert [h["id"] for h in hits] == ["shark", "tax"]
    about = json.loads(cli("index", "stats", folder, "--json", **environment).stdout)
    assert (about["kind"], about["encoder"], about["documents"]) == (kind, "char_trigrams", 3)
    missing = cli(*search)
    assert missing.returncode == 2, "neither plugin exists without its package"
    assert len(missing.stderr.splitlines()) == 1


def test_encoder_returns_normalized_vectors(load: Callable) -> None:
    cls = load("encoder", "char_trigrams")
    encoder, encoded = cls(cls.Options()), []
    texts = ["pilot fish", "Pilot  FISH", "pilto fish", "income tax", ""]
    vectors = encoder.encode_documents(texts, encoded.append).pooled
    assert encoded == [5]
    assert vectors.shape == (5, encoder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(encoder.encode_queries(texts)[2].pooled, vectors[2:3])
    assert vectors[0] @ vectors[2] > 0.5, "a typo changes few trigrams"
    assert vectors[0] @ vectors[3] < 0.1


@pytest.mark.parametrize("center", [True, False])
def test_index_ranking_matches_naive_search(load: Callable, tmp_path: Path, center: bool) -> None:
    from pilotfish.retrieval import Index

    encoder, cls = load("encoder", "char_trigrams"), load("index", "binary_vectors")
    rng = np.random.default_rng(0)
    words = ["shark", "pilot", "remora", "reef", "tax", "return", "April", "yeast", "bread", "engine"]
    texts = {f"d{i}": " ".join(rng.choice(words, 6)) for i in range(60)}
    with Index.create(tmp_path / "index", cls.name, encoder.name, {"center": center}) as index:
        names = list(texts)
        index.add([{"id": n, "text": texts[n], "metadata": {"even": i % 2 == 0}} for i, n in enumerate(names[:40])])
        index.add([{"id": n, "text": texts[n], "metadata": {"even": i % 2 == 0}} for i, n in enumerate(names[40:])])
        vectors = encoder(encoder.Options()).encode_documents(list(texts.values())).pooled
        threshold = vectors[:40].mean(0) if center else 0
        query = encoder(encoder.Options()).encode_queries(["pilot and shark"]).pooled[0] - threshold
        scores = dict(zip(names, np.where(vectors > threshold, 1, -1) @ query, strict=True))

        def check(allowed: list[str], where: str | None = None) -> None:
            hits = index.search("pilot and shark", k=7, where=where)
            best = sorted((scores[n] for n in allowed), reverse=True)[:7]
            np.testing.assert_allclose([h.score for h in hits], best, atol=1e-4)
            np.testing.assert_allclose([scores[h.id] for h in hits], best, atol=1e-4)  # ties in any order
            assert {h.id for h in hits} <= set(allowed)

        check(names)
        check([n for i, n in enumerate(names) if i % 2 == 0], "even = true")
        index.delete(names[:5])
        check(names[5:])
        index.compact()
        check(names[5:])
        index.check()


def test_refuses_wrong_index_options(load: Callable, tmp_path: Path) -> None:
    from pilotfish.retrieval import Index, RetrievalError

    load("index", "binary_vectors")
    with pytest.raises(RetrievalError, match=r"pilotfish\.index\.centre: unknown, did you mean 'center'\?"):
        Index.create(tmp_path / "index", "binary_vectors", options={"centre": False})
    with pytest.raises(RetrievalError, match="no-such-encoder"):
        Index.create(tmp_path / "index", "binary_vectors", "no-such-encoder")


# ------------------------------------------------------------------------------------------------------------- command


def test_command_runs(cli: Callable, install: Callable, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": install("command_kv_size")}
    assert "kv-size" in cli("--help", **environment).stdout
    assert "kv-size" not in cli("--help").stdout
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # 30 layers * 2 (keys and values) * 3 heads * 64 values * 2 bytes * 1024 tokens
    assert cli("kv-size", str(tmp_path), **environment).stdout == "22.5 MiB for 1024 tokens\n"
    wide = cli("kv-size", str(tmp_path), "--tokens", "2048", "--bytes-per-value", "4", **environment)
    assert wide.stdout == "90.0 MiB for 2048 tokens\n"
    unknown = cli("kv-size", str(tmp_path), "--token", "1", **environment)
    assert unknown.returncode == 2
    assert "--tokens" in unknown.stderr
    missing = cli("kv-size", str(tmp_path / "none"), **environment)
    assert missing.returncode == 2
    assert "no configuration of a decoder model" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_command_plugin_registers_no_class(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install("command_kv_size"))
    manager = PluginManager().load(entry_points(group="pilotfish", name="kv_size"))
    assert manager.failures == []
    assert not any(manager.classes(kind) for kind in HOOKS)
