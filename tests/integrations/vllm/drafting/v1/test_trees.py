"""Tree verification in a real engine: caches as if there had been no tree, seeds, and steps that take more."""

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def trees(start, model, drafting_args):
    engine = start(model, max_num_batched_tokens=128, **drafting_args(30, name="rasd", verification="tree", nodes=30))
    yield engine
    engine.close()


@pytest.mark.shows("rasd", "tree verification")
def test_the_cache_is_that_of_the_same_tokens_without_a_tree(trees, prompts) -> None:
    """Requests that join in chunks of 128 tokens, trees of 30 nodes, in float32."""
    answer = trees.ask(do="integrity", prompts=prompts[:5], max_tokens=40, looks=12)
    assert answer["moved"] > 5
    assert answer["worst"] < 1e-4 * answer["scale"]


@pytest.mark.shows("rasd", "seeds of requests")
def test_seeds_decide_beside_a_request_that_vllm_samples(trees, prompts) -> None:
    """Twins in one batch draw alike, though a third request is sampled by vLLM in the same steps."""
    twin = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 24, "seed": 5, "ignore_eos": True}
    penalty = {"temperature": 0, "max_tokens": 24, "repetition_penalty": 1.2}
    # Short prompts, read in one step: vLLM's CPU build fails on a seeded request whose prompt comes in chunks.
    short = [p[:30] for p in prompts]
    answer = trees.ask(do="sample", prompts=[short[0], short[1], short[0]], sampling=[twin, penalty, twin])
    assert answer["tokens"][0] == answer["tokens"][2]
    other = trees.ask(do="sample", prompts=[short[0]], sampling=[{**twin, "seed": 6}])
    assert other["tokens"][0] != answer["tokens"][0]
