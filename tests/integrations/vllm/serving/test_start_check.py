"""`serve --print` and `doctor MODEL` answer as the engine does: families of models, plugins, options, and both runners.

The models are configurations without weights.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 256},
    "Gemma2": ALTERNATING,
    "Gemma3": ALTERNATING,
    "GptOss": {**EXPERTS, **ALTERNATING},
}
TIDAL = {"kv": "tidal_decode,budget=128"}
RAZOR = {"kv": "razor_attention,keep=[[0,0]],window=64"}
CHAIN, TREE = {"drafter": "token_recycling"}, {"drafter": "rasd,verification=tree"}
CORRECTED = {"kv": "tidal_decode,budget=128,correction_interval=16"}
SELECTIONS: dict[str, dict[str, str]] = {
    "chain": CHAIN,
    "tree": TREE,
    "tidal": TIDAL,
    "razor": RAZOR,
    "tidal and chain": {**TIDAL, **CHAIN},
    "tidal and tree": {**TIDAL, **TREE},
    "razor and chain": {**RAZOR, **CHAIN},
    "corrected": CORRECTED,
    "corrected and chain": {**CORRECTED, **CHAIN},
    "pruner": {"pruner": "aim"},
}
REFUSED = {  # selection: families that are refused, and a part of the reason
    "tree": {"Mistral": "a sliding window", "Gemma2": "soft capping", "Gemma3": "a sliding window", "GptOss": "sinks"},
    "tidal": {"Mistral": "no layer of the model attends to all", "Gemma2": "soft capping", "GptOss": "sinks"},
    "razor": dict.fromkeys(("Mistral", "Gemma2", "Gemma3", "GptOss"), "it has its own sliding window"),
    "tidal and tree": dict.fromkeys(FAMILIES, "") | {"Llama": "together with a KV policy"},
    "corrected and chain": dict.fromkeys(FAMILIES, "") | {"Llama": "draft tokens would be counted as computed"},
    "pruner": dict.fromkeys(FAMILIES, "it takes no images"),
}
REFUSED |= {"tidal and chain": REFUSED["tidal"], "razor and chain": REFUSED["razor"], "corrected": REFUSED["tidal"]}
# With the V2 runner: selections that are refused for every family. Drafters verify chains there, without a KV policy.
REFUSED_V2 = {
    name for name, one in SELECTIONS.items() if "drafter" in one and ("kv" in one or "tree" in one["drafter"])
} | {"corrected"}

ANSWERS = """
import json, os, sys
if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    sys.path.insert(0, sys.argv[3])
    import triton_worker  # the V2 runner needs Triton, which is interpreted
from pilotfish.integrations.vllm.serving.command import compose_serve_command
from pilotfish.integrations.vllm.serving.start_check import check_start
from pilotfish.plugins.config import ConfigError
from pilotfish.plugins.contracts import Unsupported
answers = {}
for folder in json.loads(sys.argv[1]):
    for name, chosen in json.loads(sys.argv[2]).items():
        try:
            check_start(compose_serve_command(folder, {"drafter": None, "kv": None, "pruner": None, **chosen}, []))
            answer = None
        except (ConfigError, Unsupported) as error:
            answer = str(error)
        answers[f"{os.path.basename(folder)} {name}"] = answer
print("ANSWERS", json.dumps(answers))
"""
Answers = dict[str, str | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with the configuration of each family."""
    import transformers

    root, folders = tmp_path_factory.mktemp("families"), {}
    for family, options in FAMILIES.items():
        kind = "Gemma3Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{kind}Config")(**SHAPE, **options)
        config.architectures = [f"{family}ForCausalLM"]
        config.save_pretrained(root / family)
        folders[family] = root / family
    return folders


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> Callable[[str], Answers]:
    """Return a function from a runner to what the check says of each family and selection: a refusal, or None."""
    arguments = (json.dumps([str(f) for f in folders.values()]), json.dumps(SELECTIONS), str(Path(__file__).parents[1]))

    @functools.cache
    def of_runner(runner: str) -> Answers:
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": runner, "HF_HUB_OFFLINE": "1"},
        )
        return json.loads(done.stdout.partition("ANSWERS ")[2])

    return of_runner


@pytest.mark.long
@pytest.mark.parametrize("runner", ["0", "1"])
def test_answers_by_family(answers: Callable[[str], Answers], runner: str) -> None:
    for family, name in itertools.product(FAMILIES, SELECTIONS):
        answer, expected = answers(runner)[f"{family} {name}"], REFUSED.get(name, {}).get(family)
        if runner == "1" and name in REFUSED_V2:
            expected = expected or "V2 model runner"
        assert (answer is None) == (expected is None), (family, name, answer)
        if runner == "0" and expected:
            assert expected in str(answer), (family, name)


def test_print_refuses_what_the_engine_refuses(preloaded_cli: Callable, folders: dict[str, Path]) -> None:
    both = ("--drafter", "rasd,verification=tree", "--kv", "tidal_decode")
    refused(preloaded_cli("serve", str(folders["Llama"]), *both, "--print"), "does not work together with a KV policy")
    refused(
        preloaded_cli("serve", str(folders["Gemma2"]), "--kv", "tidal_decode", "--print"), "layers.1", "soft capping"
    )
    too_long = preloaded_cli(
        "serve", str(folders["Llama"]), "--kv", "tidal_decode", "--print", "--max-model-len", "9999"
    )
    refused(too_long, "vLLM refuses the command", "max_model_len (9999)")
    unknown = preloaded_cli(
        "serve", str(folders["Llama"]), "--kv", "tidal_decode", "--print", "--max-model-length", "9"
    )
    refused(unknown, "vLLM refuses the command", "--max-model-length")


def test_doctor_checks_a_model(preloaded_cli: Callable, folders: dict[str, Path], tmp_path: Path) -> None:
    report = json.loads(preloaded_cli("doctor", str(folders["Gemma2"]), "--json").stdout)
    answers = {p["name"]: p["reason"] for p in report["plugins"] if p["kind"] in ("kv", "drafter", "pruner")}
    assert answers["token_recycling"] is answers["rasd"] is None
    assert "soft capping" in answers["tidal_decode"]
    assert "pilotfish tune razor" in answers["razor_attention"]
    assert answers["aim"] == "it takes no images; run without the pruner"
    refused(preloaded_cli("doctor", str(tmp_path)), "holds no config.json")
    refused(
        preloaded_cli("doctor", "org/model", HF_HUB_OFFLINE="0"), "expected a folder, or the name of an embedded model"
    )


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_start_exactly_where_the_check_allows(
    start, folders, answers: Callable[[str], Answers], family: str
) -> None:
    from pilotfish.integrations.vllm.serving.command import compose_serve_command

    small = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 512}
    model = str(folders[family])
    try:
        start(model, **small).close()
    except RuntimeError as error:
        pytest.skip(f"stock vLLM does not start: {error}")
    for name, chosen in SELECTIONS.items():
        answer = answers("0")[f"{family} {name}"]
        try:
            command = compose_serve_command(model, {"drafter": None, "kv": None, "pruner": None, **chosen}, [])
        except ValueError:  # refused before vLLM is asked
            assert answer is not None
            continue
        config = {
            flag.removeprefix("--").replace("-", "_"): json.loads(command.options[command.options.index(flag) + 1])
            for flag in ("--additional-config", "--speculative-config")
            if flag in command.options
        }
        try:
            engine = start(model, **small, **config)
        except RuntimeError as error:
            assert answer is not None, (name, str(error))
            assert answer.split(": ", 1)[1].split("; ")[0] in str(error), name
        else:
            engine.close()
            assert answer is None, name
