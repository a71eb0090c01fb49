"""RazorAttention with vLLM's Triton backend in a running engine, interpreted: output equals that of the CPU backend.

Below the policy the two share only the cache manager: they have C++ and Triton kernels, and different cache layouts.
"""

import random
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

GREEDY = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
PROMPTS = [
    ([random.Random(i).randrange(1000, 40000) for i in range(60)] * 5)[:n]
    for n in (250, 40, 190)  # over, within and over the window
]
ASK: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}
OPTIONS = {"name": "razor_attention", "keep": [[0, 1]], "window": 64, "ratio": 0, "prefill": "streaming"}


@pytest.mark.shows("razor_attention", "Triton kernels, interpreted")
def test_output_matches_cpu_backend(start, start_interpreted, tiny_model) -> None:
    config = {"block_size": 32, "additional_config": {"pilotfish": {"kv": OPTIONS}}}
    native = start(tiny_model, max_num_batched_tokens=128, **config)
    expected = native.ask(**ASK)["tokens"]
    native.close()
    engine = start_interpreted(tiny_model, "0", **config)
    assert any(name.endswith(".WindowedTritonImpl") for name in engine.ask(do="state")["classes"])
    assert engine.ask(**ASK)["tokens"] == expected
    blocks = engine.ask(do="blocks")
    assert blocks["free"] == blocks["all"]
