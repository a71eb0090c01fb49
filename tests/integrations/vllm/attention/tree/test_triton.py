"""Tree attention with vLLM's Triton backend in a running engine, interpreted: output equals that of the CPU backend.

Below the drafter the two share no code: they have C++ and Triton kernels, and different cache layouts.
"""

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
PROMPTS = [(list(range(1000, 1000 + k)) * 60)[:n] for k, n in ((7, 150), (5, 40), (9, 97))]
ASK = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}


@pytest.mark.shows("rasd", "Triton kernels, interpreted")
def test_output_matches_cpu_backend(start, start_interpreted, tiny_model, drafting_args) -> None:
    native = start(tiny_model, max_num_batched_tokens=128)
    expected = native.ask(**ASK)["tokens"]
    native.close()
    engine = start_interpreted(tiny_model, "0", **drafting_args(10, name="rasd", verification="tree", nodes=10))
    for _ in range(2):  # drafts are retrieved in the second pass
        assert engine.ask(**ASK)["tokens"] == expected
    assert any(name.endswith(".TreeTritonImpl") for name in engine.ask(do="state")["classes"])
    assert engine.ask(do="trees")["moved"] > 0
