"""Drafters on vLLM's V2 model runner: the text is that of a stock engine, and scheduling stays asynchronous."""

from typing import Any

import pytest

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
SAMPLED = {**GREEDY, "temperature": 0.8}
KINDS: list[dict[str, Any]] = [
    {**SAMPLED, "seed": 7},
    {**SAMPLED, "seed": 7, "top_p": 0.9},
    {**SAMPLED, "seed": 1, "top_k": 20},
    {**SAMPLED, "seed": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {**GREEDY, "logprobs": 2},
    {**GREEDY, "logit_bias": {5: 4.0}, "min_tokens": 4},
]
PROMPTS = [(list(range(100, 100 + period)) * 60)[:length] for period, length in ((7, 150), (5, 40), (9, 97), (3, 20))]


@pytest.fixture(scope="module")
def engines(start_interpreted, tiny_model) -> Any:
    """Return a stock engine on the V2 runner, and one with Token Recycling."""
    common = {"skip_tokenizer_init": True}
    stock = start_interpreted(tiny_model, "1", **common)
    drafted = start_interpreted(
        tiny_model,
        "1",
        **common,
        speculative_config={"method": "ngram_gpu", "num_speculative_tokens": 4},
        additional_config={"pilotfish": {"drafter": {"name": "token_recycling"}}},
    )
    yield stock, drafted
    stock.close()
    drafted.close()


def complete(engine: Any, sampling: list[dict[str, Any]]) -> dict[str, Any]:
    return engine.ask(do="sample", prompts=[PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))], sampling=sampling)


def test_greedy_text_equals_stock(engines) -> None:
    stock, drafted = engines
    expected, ours = complete(stock, [GREEDY] * 4), complete(drafted, [GREEDY] * 4)
    assert ours["tokens"] == expected["tokens"]
    assert ours["request_steps"] < 0.8 * expected["request_steps"]
    again = complete(drafted, [GREEDY] * 4)
    assert again["tokens"] == expected["tokens"]
    assert again["request_steps"] < ours["request_steps"]


def test_seeded_text_equals_stock(engines) -> None:
    stock, drafted = engines
    expected, ours = complete(stock, KINDS), complete(drafted, KINDS)
    assert ours["tokens"] == expected["tokens"]
    assert ours["drafted"] > 0


def test_scheduling_stays_asynchronous(engines) -> None:
    _, drafted = engines
    facts = drafted.ask(do="device_drafting")
    assert facts["async_scheduling"] and facts["v2_runner"]
    assert facts["speculator"] == "PilotfishSpeculator"
    assert facts["counts"]["steps"] > 0
    assert facts["requests"] == 0  # the drafter has forgotten all of them
