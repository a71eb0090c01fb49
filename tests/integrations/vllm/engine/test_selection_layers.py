"""Tests of the facts about a model that plugins receive: which of its layers attend to all tokens."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from pilotfish.integrations.vllm.engine.selection import full_attention_layers


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
def test_layers_come_from_the_layer_types(config: str, layers: int, expected: Any) -> None:
    import transformers

    text = getattr(transformers, config)(num_hidden_layers=layers)
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    assert full_attention_layers(types) == expected
