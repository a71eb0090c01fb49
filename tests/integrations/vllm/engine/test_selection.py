"""Reading the plugin selection, and the cost of importing Pilotfish where no plugin is selected."""

import subprocess
import sys

import pytest

from pilotfish.integrations.vllm.engine import selection
from pilotfish.plugins.config import ConfigError, PilotfishConfig

STANDARD = "assert not {'torch', 'vllm', 'numpy', 'numba', 'typer', 'rich'} & set(sys.modules), sys.modules.keys()"


@pytest.mark.parametrize(
    "module", ["pilotfish.integrations.vllm.plugin", "pilotfish.plugins.hookspecs", "pilotfish.plugins.manager"]
)
def test_entry_module_imports_the_standard_library_only(module: str) -> None:
    code = f"import sys, {module}; {STANDARD}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_register_never_raises_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from pilotfish.integrations.vllm.plugin import register\n"
        "register(); register()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_the_integration_package_needs_no_torch() -> None:
    code = f"import sys, pilotfish.integrations.vllm as v; assert 'PilotfishProposer' in v.__all__; {STANDARD}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("additional", "speculative", "concerned"),
    [
        ({}, None, False),
        (None, None, False),
        ({"other": 1}, {"method": "ngram"}, False),
        ({"pilotfish": {}}, None, True),
        ({}, {"model": selection.PROPOSER_CLASS}, True),
    ],
)
def test_is_selected(additional, speculative, concerned: bool) -> None:
    assert selection.is_selected(additional, speculative) is concerned


def test_refuses_speculation_without_drafter() -> None:
    with pytest.raises(ConfigError, match=r"pilotfish.drafter: missing, though"):
        selection.read_config({}, {"model": selection.PROPOSER_CLASS})


def test_refuses_unknown_kv_policy() -> None:
    with pytest.raises(ConfigError, match=r"pilotfish\.kv\.name: 'razor': unknown"):
        selection.read_config({"pilotfish": {"kv": "razor"}})


def test_pilotfish_disable_skips_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTFISH_DISABLE", "1")
    assert selection.read_config({"pilotfish": {"nonsense": 1}}) == PilotfishConfig()


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        ("Gemma3TextConfig", 12, (5, 11)),
        ("Gemma2Config", 4, (1, 3)),
        ("GptOssConfig", 8, (1, 3, 5, 7)),
        ("Qwen3NextConfig", 12, (3, 7, 11)),
        ("Llama4TextConfig", 8, (3, 7)),
        ("Qwen2Config", 4, (0, 1, 2, 3)),
        ("JambaConfig", 16, (4, 12)),
        ("LlamaConfig", 4, None),
    ],
)
def test_layers_come_from_the_layer_types(config: str, layers: int, expected: tuple[int, ...] | None) -> None:
    import transformers

    text = getattr(transformers, config)(num_hidden_layers=layers)
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    assert selection.full_attention_layers(types) == expected
