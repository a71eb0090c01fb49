"""TidalDecode in a running engine: identical to stock vLLM with a full budget, and independent of batching."""

import pytest
from engine_prompts import GREEDY, PROMPTS, ask

from pilotfish.kvcache.profiles import SHIPPED, read_profile

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = 30
# The selections that the kernel tests cover too; engines run them in the long tests.
FURTHER_RULES = [("sum", "token"), ("head", "page"), ("union", "page"), ("max", "token")]
PAGE = {"budget": 192, "sinks": 4, "recent": 32, "head_aggregation": "sum", "granularity": "page"}


def kv(**options) -> dict:
    """Return engine arguments that select TidalDecode."""
    return {"additional_config": {"pilotfish": {"kv": {"name": "tidal_decode", **options}}}}


ASK = ask(PROMPTS)


@pytest.fixture(scope="module")
def stock(stock_engine) -> list[list[int]]:
    """Return the output of stock vLLM."""
    tokens = stock_engine.ask(**ASK)["tokens"]
    stock_engine.close()
    return tokens


@pytest.fixture(scope="module")
def sparse(start, model, stock):
    """Start an engine with the policy, blocks of 64 tokens, chunks of 128 tokens, and prefix caching."""
    del stock  # its engine has ended
    return start(
        model,
        block_size=64,
        max_num_batched_tokens=128,
        enable_prefix_caching=True,
        **kv(budget=1024),
    )


def test_uses_sparse_backend_and_layers_of_the_shipped_profile(sparse) -> None:
    (path,) = SHIPPED.glob("tidal_decode-smollm2*.json")
    layers = read_profile(path).settings["default"]["select_layers"]
    assert sparse.ask(do="attention") == {"impl": ["SparseCPUImpl"], "isa": ["vec"], "select": layers}


@pytest.mark.shows("tidal_decode", "full budget equals stock")
def test_output_is_identical_with_full_budget(sparse, stock) -> None:
    assert sparse.ask(**ASK)["tokens"] == stock


@pytest.mark.parametrize("role", ["FULL", "SELECT", "SPARSE"])
def test_output_is_identical_with_our_kernel(sparse, stock, role: str) -> None:
    """Test our kernel in every layer: sparse layers without selected tokens attend to all tokens."""
    sparse.ask(do="attention", plan={"roles": [role] * LAYERS, "rule": PAGE})
    assert sparse.ask(**ASK)["tokens"] == stock


@pytest.mark.parametrize(
    ("aggregation", "granularity"),
    [
        ("sum", "page"),
        ("kv_head", "token"),
        *(pytest.param(*rule, marks=pytest.mark.long) for rule in FURTHER_RULES),
    ],
)
@pytest.mark.shows("tidal_decode", "batches of mixed requests", "chunked prefill")
def test_output_is_identical_in_mixed_batch(sparse, aggregation: str, granularity: str) -> None:
    """Test that output is the same alone and with requests that prefill in chunks, decode, start or finish."""
    rule = {**PAGE, "head_aggregation": aggregation, "granularity": granularity}
    roles = ["FULL", "FULL"] + ["SELECT" if i in (2, 13) else "SPARSE" for i in range(2, LAYERS)]
    sparse.ask(do="attention", plan={"roles": roles, "rule": rule})
    together = sparse.ask(**ASK)["tokens"]
    alone = [sparse.ask(do="sample", prompts=[p], sampling=[GREEDY])["tokens"][0] for p in PROMPTS]
    assert together == alone


def test_output_changes_with_small_budget(sparse, stock) -> None:
    """Test that output changes with a budget that excludes the repeated text: only selected tokens are read."""
    rule = {**PAGE, "budget": 96, "recent": 0}
    sparse.ask(do="attention", plan={"roles": ["SELECT"] + ["SPARSE"] * (LAYERS - 1), "rule": rule})
    assert sparse.ask(**ASK)["tokens"] != stock


@pytest.mark.long
def test_output_is_identical_with_kv_correction(start, model, stock, sparse) -> None:
    """Test that KV correction leaves output identical where no layer is sparse, in a batch with requests in prefill."""
    sparse.close()
    every = list(range(LAYERS))
    corrected = start(
        model,
        max_num_batched_tokens=128,
        **kv(budget=192, recent=32, select_layers=every, full_layers=[], correction_interval=3),
    )
    assert corrected.ask(**ASK)["tokens"] == stock
    assert corrected.ask(do="corrected")["tokens"] > 0
    corrected.close()


@pytest.mark.long
@pytest.mark.shows("tidal_decode", "two tensor-parallel ranks")
def test_two_tensor_parallel_ranks_select_the_same_tokens(start, tiny_model, two_ranks) -> None:
    """Test that ranks, each with half of the heads, select the tokens that a single rank selects."""
    policy = kv(budget=192, recent=32, full_layers=[], select_layers=[0])
    prompts = [p[:460] for p in PROMPTS]
    sampling = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    ask = {"do": "sample", "prompts": prompts, "sampling": [sampling] * len(prompts)}
    one = start(tiny_model, max_model_len=512, **policy)
    expected = one.ask(**ask)["tokens"]
    one.close()
    assert two_ranks(tiny_model, prompts, **policy)["tokens"] == expected


@pytest.mark.long
@pytest.mark.shows("tidal_decode", "preemption")
def test_preempted_requests_resume(start, model) -> None:
    small = start(
        model, num_gpu_blocks_override=24, block_size=64, enable_prefix_caching=False, **kv(budget=192, recent=32)
    )
    ask = {"do": "sample", "prompts": [PROMPTS[0][:500], PROMPTS[2], PROMPTS[4]]}
    sampling = {**GREEDY, "max_tokens": 120}
    together = small.ask(**ask, sampling=[sampling] * 3)
    assert together["preemptions"] > 0
    alone = [small.ask(do="sample", prompts=[p], sampling=[sampling])["tokens"][0] for p in ask["prompts"]]
    assert [t[:20] for t in together["tokens"]] == [t[:20] for t in alone]
