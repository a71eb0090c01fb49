"""Trees over vLLM's Triton backend in a real engine, kernels interpreted: the text is that of the CPU backend.

The two share no code below the drafter: C++ and Triton kernels, other cache layouts.
"""

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
PROMPTS = [(list(range(1000, 1000 + k)) * 60)[:n] for k, n in ((7, 150), (5, 40), (9, 97))]
ASK = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}


@pytest.mark.shows("rasd", "Triton kernels, interpreted")
def test_the_text_is_that_of_the_other_backend(start, start_interpreted, tiny_model, drafting_args) -> None:
    native = start(tiny_model, max_num_batched_tokens=128)
    expected = native.ask(**ASK)["tokens"]
    native.close()
    engine = start_interpreted(tiny_model, "0", **drafting_args(10, name="rasd", verification="tree", nodes=10))
    for _ in range(2):  # the second time there is something to draft
        assert engine.ask(**ASK)["tokens"] == expected
    assert any(name.endswith(".TreeTritonImpl") for name in engine.ask(do="state")["classes"])
    assert engine.ask(do="trees")["moved"] > 0
