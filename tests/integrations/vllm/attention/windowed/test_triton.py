"""RazorAttention with vLLM's Triton backend in a running engine, interpreted: output equals that of the CPU backend.

Below the policy the two share only the cache manager: they have C++ and Triton kernels, and different cache layouts.
"""

import random
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "detokenize": False}
PROMPTS = [
    ([random.Random(i).randrange(3, 512) for i in range(60)] * 5)[:n]
    for n in (250, 40, 190)  # over, within and over the window
]
ASK: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}
BLOCKS = 36  # two prompts fit, but not all of their outputs
OPTIONS = {"name": "razor_attention", "keep": [[0, 1]], "window": 64, "ratio": 0, "prefill": "streaming"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return {"block_size": 32, "skip_tokenizer_init": True, "additional_config": {"pilotfish": {"kv": OPTIONS}}}


@pytest.fixture(scope="module")
def expected(start, small_vocabulary, config) -> list[list[int]]:
    """Return the output of the CPU backend."""
    native = start(small_vocabulary, max_num_batched_tokens=128, **config)
    answers = native.ask(**ASK)["tokens"]
    native.close()
    return answers


@pytest.mark.shows("razor_attention", "Triton kernels, interpreted")
@pytest.mark.parametrize(
    ("runner", "release"),
    [
        pytest.param("1", "0.33", marks=[pytest.mark.vllm_033, pytest.mark.long]),
        pytest.param("1", "0.32", marks=pytest.mark.long),
        pytest.param("0", "0.32", marks=pytest.mark.long),
    ],
)
def test_output_matches_cpu_backend(
    start_interpreted, small_vocabulary, config, expected, runner: str, release: str
) -> None:
    engine = start_interpreted(small_vocabulary, runner, release, **config)
    assert any(name.endswith(".WindowedTritonImpl") for name in engine.ask(do="state")["classes"])
    assert engine.ask(**ASK)["tokens"] == expected
    blocks = engine.ask(do="blocks")
    assert blocks["free"] == blocks["all"]
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_v2_runner_output_is_identical_after_preemption(start_interpreted, small_vocabulary, prefill: str) -> None:
    """Test that a request which reads its own output again on the V2 runner generates the same text as alone."""
    policy = {"pilotfish": {"kv": {**OPTIONS, "prefill": prefill}}}
    options = {"block_size": 32, "max_model_len": 256, "skip_tokenizer_init": True, "additional_config": policy}
    prompts = [PROMPTS[0][:100], PROMPTS[2][:110]]
    sampling = [{**GREEDY, "max_tokens": 70}] * 2
    alone = start_interpreted(small_vocabulary, "1", **options)
    expected = [alone.ask(do="sample", prompts=[p], sampling=sampling[:1])["tokens"][0] for p in prompts]
    alone.close()
    engine = start_interpreted(small_vocabulary, "1", num_gpu_blocks_override=BLOCKS, **options)
    together = engine.ask(do="sample", prompts=prompts, sampling=sampling)
    engine.close()
    assert together["preemptions"] > 0
    assert together["tokens"] == expected
