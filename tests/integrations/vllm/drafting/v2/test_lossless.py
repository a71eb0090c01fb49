"""Drafters on vLLM's V2 model runner: the text is that of a stock engine, and scheduling stays asynchronous."""

from collections import defaultdict
from random import Random
from typing import Any

import pytest
from default_plugins import DRAFTER_COUNTERS
from gpu import HAS_GPU
from stock_engine import StockEngine

from pilotfish.integrations.vllm.drafting.compatibility import device_speculation
from pilotfish.plugins.token_recycling import TokenRecycling

pytestmark = [pytest.mark.engine, pytest.mark.slow]
LONG = pytest.mark.long

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False}
SAMPLED = {**GREEDY, "temperature": 0.8}
# vLLM's kernel for top-k and top-p cannot be interpreted.
KINDS: list[dict[str, Any]] = [
    {**SAMPLED, "seed": 7},
    *([{**SAMPLED, "seed": 7, "top_p": 0.9}, {**SAMPLED, "seed": 1, "top_k": 20}] if HAS_GPU else []),
    {**SAMPLED, "seed": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {**GREEDY, "logprobs": 2},
    {**SAMPLED, "seed": 3, "logprobs": 1},
    {**GREEDY, "allowed_token_ids": [5, 7, 11]},
    {**SAMPLED, "seed": 4, "min_tokens": 4, "stop_token_ids": list(range(100))},
]
SCHEMA = {"type": "object", "properties": {"depth": {"type": "integer"}}, "required": ["depth"]}
PROMPTS = [(list(range(100, 100 + period)) * 60)[:length] for period, length in ((7, 20), (5, 12), (9, 16), (3, 8))]


DRAFTERS: dict[str, dict[str, Any]] = {"rasd": {"outputs": 256}, "token_recycling": {"order": 2}}
SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 3, 1]]},
    "tree": {"num_speculative_tokens": 6, "num_speculative_tokens_per_batch_size": [[1, 2, 6], [3, 3, 4]]},
}


def on_v2(*features: str) -> list[str]:
    """Return the names of features in the table of compatibility."""
    return [f"V2 model runner: {feature}" for feature in features]


def drafter_param(name: str, verification: str, release: str, *marks: pytest.MarkDecorator) -> Any:
    """Return a fixture's parameter; what the tests show of the drafter goes into the table of compatibility."""
    marks = (
        *marks,
        pytest.mark.shows(name, *on_v2(f"{verification}s")),
        *([pytest.mark.vllm_033] if release == "0.33" else []),
    )
    return pytest.param((name, verification, release), id=f"{name}-{verification}-vllm{release}", marks=marks)


@pytest.fixture(scope="module")
def expected_greedy(small_vocabulary, start) -> dict[str, Any]:
    """Return the output of vLLM's V1 runner, whose engine starts sooner; longer tests compare with the V2 runner."""
    engine = start(small_vocabulary, skip_tokenizer_init=True)
    expected = complete(engine, [GREEDY] * 2)
    engine.close()
    return expected


@pytest.fixture(
    scope="module",
    params=[
        drafter_param("rasd", "chain", "0.33"),  # runs Token Recycling's kernels too
        drafter_param("token_recycling", "tree", "0.33", LONG),
        drafter_param("rasd", "tree", "0.33", LONG),
        drafter_param("rasd", "chain", "0.32", LONG),
        drafter_param("rasd", "tree", "0.32", LONG),
        drafter_param("token_recycling", "chain", "0.33", LONG),
        drafter_param("token_recycling", "chain", "0.32", LONG),
        drafter_param("token_recycling", "tree", "0.32", LONG),
    ],
)
def chosen(request, small_vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of both engines, and those that select the drafter."""
    name, verification, release = request.param
    common = {
        "model": small_vocabulary,
        "runner": "1",
        "release": release,
        "skip_tokenizer_init": True,
        "async_scheduling": True,
    }
    return common, {
        "speculative_config": {"method": "ngram_gpu", **SHAPES[verification]},
        "additional_config": {"pilotfish": {"drafter": {"name": name, "verification": verification, **DRAFTERS[name]}}},
    }


@pytest.fixture(scope="module")
def drafted(chosen, start_interpreted) -> Any:
    """Return an engine on the V2 runner with a drafter."""
    common, drafting = chosen
    engine = start_interpreted(**common, **drafting, disable_log_stats=False)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def v2_answers() -> dict[str, dict[str, Any]]:
    """Return the answers of stock engines on the V2 runner, by release."""
    return defaultdict(dict)


@pytest.fixture(scope="module")
def stock(chosen, start_interpreted, v2_answers) -> Any:
    """Return a stock engine on the V2 runner."""
    common, _ = chosen
    engine = StockEngine(lambda: start_interpreted(**common), v2_answers[common["release"]])
    yield engine
    engine.close()


def complete(engine: Any, sampling: list[dict[str, Any]]) -> dict[str, Any]:
    return engine.ask(do="sample", prompts=[PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))], sampling=sampling)


def test_greedy_text_equals_stock(drafted, expected_greedy) -> None:
    ours = complete(drafted, [GREEDY] * 2)
    assert ours["tokens"] == expected_greedy["tokens"]
    assert ours["drafted"] > 0
    again = complete(drafted, [GREEDY])  # the rows of all contexts are known
    assert again["tokens"] == expected_greedy["tokens"][:1]
    assert again["request_steps"] < 0.25 * expected_greedy["request_steps"]


@LONG
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verification", ["chain", "tree"])
def test_measured_number_of_draft_tokens(
    small_vocabulary, expected_greedy, start_interpreted, verification: str
) -> None:
    """Test the default schedule, whose number of draft tokens follows from measured steps."""
    config = {"name": "token_recycling", "order": 2, "verification": verification}
    engine = start_interpreted(
        small_vocabulary,
        runner="1",
        skip_tokenizer_init=True,
        async_scheduling=True,
        speculative_config=device_speculation(TokenRecycling, verification),
        additional_config={"pilotfish": {"drafter": config}},
    )
    for _ in range(3):
        assert complete(engine, [GREEDY] * 2)["tokens"] == expected_greedy["tokens"]
    assert "the number of draft tokens per request follows measured step times: 0, " in engine.log.read_text()
    engine.close()


@LONG
@pytest.mark.timeout(3600)
def test_greedy_text_of_200_prompts_equals_stock(stock, drafted) -> None:
    random = Random(0)
    prompts = [random.choices(range(3, 512), k=random.randint(4, 24)) * random.randint(1, 2) for _ in range(200)]
    ask = {"do": "sample", "prompts": prompts, "sampling": [{**GREEDY, "max_tokens": 6}] * len(prompts)}
    expected, ours = stock.ask(**ask), drafted.ask(**ask)
    assert ours["tokens"] == expected["tokens"]
    assert ours["request_steps"] < expected["request_steps"]


@LONG
@pytest.mark.shows_too(*on_v2("seeds of requests", "penalties", "logprobs", "allowed tokens"))
def test_seeded_text_equals_stock(stock, drafted) -> None:
    expected, ours = complete(stock, KINDS), complete(drafted, KINDS)
    assert ours["tokens"] == expected["tokens"]
    assert ours["drafted"] > 0


@LONG
@pytest.mark.shows_too(*on_v2("switched off by a request"))
def test_a_request_switches_the_drafter_off(stock, drafted) -> None:
    off = {**GREEDY, "extra_args": {"pilotfish_drafter": "off"}}
    mixed = complete(drafted, [GREEDY, off, GREEDY, off])
    assert mixed["tokens"] == complete(stock, [GREEDY] * 4)["tokens"]
    alone = complete(drafted, [off] * 2)
    assert alone["drafted"] == 0 < mixed["drafted"]


@LONG
@pytest.mark.shows_too(*on_v2("metrics"))
def test_metrics_count_drafts(drafted) -> None:
    before = drafted.ask(do="metrics")
    for _ in range(2):  # the second time from learned rows
        complete(drafted, [GREEDY] * 2)
    after = drafted.ask(do="metrics")
    for counter in DRAFTER_COUNTERS:
        assert after[counter] > before.get(counter, 0), counter


@pytest.mark.shows_too(*on_v2("asynchronous scheduling"))
def test_scheduling_stays_asynchronous(drafted) -> None:
    facts = drafted.ask(do="device_drafting")
    assert facts["async_scheduling"] and facts["v2_runner"]
    assert facts["speculator"] == "PilotfishSpeculator"
    assert facts["counts"]["steps"] > 0
    assert facts["requests"] == facts["held"]  # vLLM forgets a request at the step after its last one


@LONG
@pytest.mark.shows_too(*on_v2("preemption", "chunked prefill", "prefix caching"))
def test_preemption_chunked_prompts_and_prefix_caching(chosen, stock, drafted, start_interpreted) -> None:
    """Test an engine with blocks for two of three requests, prompts in chunks of 16 tokens, and cached prefixes."""
    sampling = [{**GREEDY, "max_tokens": 40}] * 3
    expected = complete(stock, sampling)["tokens"]
    drafted.close()  # at most two engines at once; this is the last test
    common, drafting = chosen
    blocks = {"max_model_len": 96, "num_gpu_blocks_override": 7, "block_size": 16}
    few = start_interpreted(**common, **drafting, **blocks, max_num_batched_tokens=16, enable_prefix_caching=True)
    preempted = complete(few, sampling)
    assert preempted["tokens"] == expected
    assert preempted["preemptions"] > 0
    assert preempted["drafted"] > 0
    assert complete(few, sampling)["tokens"] == expected  # the prefixes are cached now
    few.close()


@LONG
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verification", ["chain", "tree"])
@pytest.mark.shows("token_recycling", *on_v2("two tensor-parallel ranks"))
def test_two_tensor_parallel_ranks(small_vocabulary, expected_greedy, two_ranks, verification: str) -> None:
    config = {"name": "token_recycling", "order": 2, "verification": verification}
    answer = two_ranks(
        small_vocabulary,
        PROMPTS[:2] * 2,  # the second time from learned rows
        [{k: v for k, v in GREEDY.items() if k != "ignore_eos"}],
        interpreted=True,
        max_num_seqs=2,
        skip_tokenizer_init=True,
        speculative_config={"method": "ngram_gpu", **SHAPES[verification]},
        additional_config={"pilotfish": {"drafter": config}},
    )
    assert answer["tokens"] == expected_greedy["tokens"] * 2
    assert answer["accepted"] > 0


@LONG
@pytest.mark.skipif(not HAS_GPU, reason="vLLM's kernel for grammars cannot be interpreted")
@pytest.mark.parametrize("verification", ["chain", "tree"])
@pytest.mark.shows("token_recycling", *on_v2("structured output"))
def test_structured_output_equals_stock(tiny_model, start_interpreted, verification: str) -> None:
    arguments = {"runner": "1", "async_scheduling": True}
    ask = {
        "do": "sample",
        "prompts": PROMPTS[:2],
        "sampling": [{"temperature": 0, "max_tokens": 8, "json_schema": SCHEMA}, GREEDY],
    }
    stock = start_interpreted(tiny_model, **arguments)
    expected = stock.ask(**ask)
    stock.close()
    assert expected["text"][0].startswith("{")
    config = {"name": "token_recycling", "order": 2, "verification": verification}
    engine = start_interpreted(
        tiny_model,
        **arguments,
        speculative_config={"method": "ngram_gpu", **SHAPES[verification]},
        additional_config={"pilotfish": {"drafter": config}},
    )
    ours = engine.ask(**ask)
    engine.close()
    assert ours["tokens"] == expected["tokens"]
    assert ours["drafted"] > 0
