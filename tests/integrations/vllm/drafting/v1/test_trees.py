"""Tree verification in a running engine: contents of the KV cache, and seeded requests."""

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def trees(start, model, drafting_args):
    engine = start(model, max_num_batched_tokens=128, **drafting_args(30, name="rasd", verification="tree", nodes=30))
    yield engine
    engine.close()


@pytest.mark.shows("rasd", "tree verification")
def test_kv_cache_equals_prefill_of_the_same_tokens(trees, prompts) -> None:
    """Test that the KV cache equals that of the same tokens in a prompt, for trees of 30 nodes in float32.

    Requests join in chunks of 128 tokens.
    """
    answer = trees.ask(do="integrity", prompts=prompts[:5], max_tokens=40, looks=12)
    assert answer["moved"] > 5
    assert answer["worst"] < 1e-4 * answer["scale"]


@pytest.mark.shows("rasd", "seeds of requests")
def test_seeded_requests_are_reproducible_in_a_mixed_batch(trees, prompts) -> None:
    """Test that equal seeded requests get equal tokens while vLLM samples a third request in the same steps."""
    seeded = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 24, "seed": 5, "ignore_eos": True}
    penalty = {"temperature": 0, "max_tokens": 24, "repetition_penalty": 1.2}
    # Short prompts, prefilled in one step: vLLM's CPU build fails on seeded requests with chunked prefill.
    short = [p[:30] for p in prompts]
    answer = trees.ask(do="sample", prompts=[short[0], short[1], short[0]], sampling=[seeded, penalty, seeded])
    assert answer["tokens"][0] == answer["tokens"][2]
    other = trees.ask(do="sample", prompts=[short[0]], sampling=[{**seeded, "seed": 6}])
    assert other["tokens"][0] != answer["tokens"][0]
