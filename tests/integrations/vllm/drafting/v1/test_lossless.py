"""Greedy output with the drafter is identical to stock vLLM, token by token, for all kinds of sampling parameters."""

from typing import Any

import pytest

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 48}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "room": {"type": "string", "maxLength": 6}},
    "required": ["name", "room"],
}


@pytest.fixture(scope="module")
def stock(stock_engine):
    return stock_engine


@pytest.fixture(scope="module", params=["chain", "tree"])
def drafted(request, start, model, drafting_args):
    if request.param == "chain":
        engine = start(model, **drafting_args())
    else:
        engine = start(model, **drafting_args(24, verification="tree"))
    engine.ask(do="draft_always")  # even where drafting does not reduce latency
    yield engine
    if request.param == "tree":
        assert engine.ask(do="trees")["moved"] > 5, "trees were verified"
    engine.close()


def both(stock, drafted, prompts: list, sampling: list[dict[str, Any]]) -> tuple[dict, dict]:
    """Complete prompts with both engines."""
    return tuple(e.ask(do="sample", prompts=prompts, sampling=sampling) for e in (stock, drafted))  # type: ignore[return-value]


@pytest.mark.shows("token_recycling", "batches of mixed requests")
def test_greedy_output_is_identical_in_a_mixed_batch(stock, drafted, prompts) -> None:
    sampling = [{**GREEDY, "max_tokens": n} for n in (48, 1, 2, 20, 64, 48, 33, 7, 48, 40, 48, 48)]
    a, b = both(stock, drafted, prompts, sampling)
    assert a["tokens"] == b["tokens"]
    assert a["finish"] == b["finish"]
    assert b["drafted"] > 20
    assert b["request_steps"] < a["request_steps"]
    state = drafted.ask(do="state")
    assert state["plugin"]["requests"] <= 8  # the runner learns of finished requests one step later
    assert state["wrapped"] == ["_on_request_state_removed", "_sample", "shutdown"]


@pytest.mark.parametrize(
    "extra",
    [
        {"repetition_penalty": 1.3},
        pytest.param({"presence_penalty": 0.7, "frequency_penalty": 0.5}, marks=pytest.mark.long),
        pytest.param({"bad_words": ["the", " and"]}, marks=pytest.mark.long),
        pytest.param({"min_tokens": 40}, marks=pytest.mark.long),
        {"stop": [".", "\n"]},
        pytest.param({"ignore_eos": True}, marks=pytest.mark.long),
        pytest.param({"allowed_token_ids": list(range(0, 49_152, 3))}, marks=pytest.mark.long),
    ],
    ids=lambda extra: next(iter(extra)),
)
@pytest.mark.shows("token_recycling", "penalties, stop strings, allowed tokens")
def test_greedy_output_is_identical_with(stock, drafted, prompts, extra: dict) -> None:
    # One plain request in the same batch: parameters must not leak from one to the other.
    sampling = [{**GREEDY, **extra}] * 3 + [GREEDY]
    a, b = both(stock, drafted, prompts[:4], sampling)
    assert a["tokens"] == b["tokens"]
    assert a["text"] == b["text"]


@pytest.mark.shows("token_recycling", "structured output")
def test_structured_output_is_identical(stock, drafted, prompts) -> None:
    a, b = both(stock, drafted, prompts[5:7], [{**GREEDY, "json_schema": SCHEMA}, GREEDY])
    assert a["tokens"] == b["tokens"]
    assert a["text"][0].startswith("{")


@pytest.mark.shows("token_recycling", "logprobs")
def test_logprobs_belong_to_the_tokens(stock, drafted, prompts) -> None:
    a, b = both(stock, drafted, prompts[:3], [{**GREEDY, "logprobs": 3}] * 2 + [GREEDY])
    assert a["tokens"] == b["tokens"]
    assert b["logprobs"][2] is None
    for one, other in zip(a["logprobs"][:2], b["logprobs"][:2], strict=True):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert x.keys() == y.keys()
            assert all(abs(x[t] - y[t]) < 1e-3 for t in x)


def test_top_k_in_a_step_without_drafts(drafted, prompts) -> None:
    """Test the prefill step, which has no drafts, and on which vLLM's CPU build fails without our fix."""
    sampling = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "max_tokens": 6, "seed": 1}
    answer = drafted.ask(do="sample", prompts=prompts[:1], sampling=[sampling])
    assert len(answer["tokens"][0]) <= 6


@pytest.mark.shows("token_recycling", "switched off by a request")
def test_a_request_can_switch_the_drafter_off(stock, drafted, prompts) -> None:
    off = {**GREEDY, "extra_args": {"pilotfish_drafter": "off"}}
    a, b = both(stock, drafted, prompts[:2], [off, off])
    assert a["tokens"] == b["tokens"]
    assert b["drafted"] == 0


def test_finished_requests_leave_no_state(drafted, prompts) -> None:
    """Test that the drafter's state does not grow with the number of finished requests."""
    for _ in range(3):
        drafted.ask(do="sample", prompts=[p[:24] for p in prompts] * 2, sampling=[{**GREEDY, "max_tokens": 6}] * 24)
    state = drafted.ask(do="state")
    assert len(state["requests"]) <= 8
    assert state["plugin"]["requests"] == len(state["requests"])
    assert state["plugin"]["tables"] == 1


@pytest.mark.slow
@pytest.mark.long
def test_greedy_output_is_identical_over_two_hundred_texts(stock, drafted, model: str) -> None:
    """Test prompts of different lengths, eight at a time, so that most steps verify drafts of several requests."""
    from pilotfish.integrations.vllm.bench import corpora

    tokenizer = corpora.tokenizer_of(model)
    cut = corpora.excerpts(tokenizer, corpora.sample_corpus(), 210, 120, "the sample")
    prompts = [ids[: 20 + 7 * i % 100] for i, ids in enumerate(cut)]
    a, b = both(stock, drafted, prompts, [{"temperature": 0, "max_tokens": 40, "ignore_eos": True}] * len(prompts))
    different = [i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y]
    assert different == []
    assert b["request_steps"] < 0.9 * a["request_steps"]
