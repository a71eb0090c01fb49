"""Tree verification in a running engine: contents of the KV cache."""

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
