"""The sampling distribution of requests without a seed on the V2 model runner equals the one without speculation."""

from typing import Any

import pytest
from sampling_distribution import assert_same_distribution, draw

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

PROMPT = list(range(100, 107)) * 2
SAMPLES, TOKENS = 96, 2  # interpreted kernels are slow
SHARP = {"temperature": 0.1, "detokenize": False}  # the model's weights are random, so its logits differ little


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("verification", "nodes"), [("chain", 2), ("tree", 3)])
@pytest.mark.shows("token_recycling", "V2 model runner: sampling")
def test_distribution_is_unchanged(small_vocabulary, start, start_interpreted, verification: str, nodes: int) -> None:
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    stock = start(small_vocabulary, **arguments)  # vLLM's V1 runner, whose engine starts sooner
    control, again = (draw(stock, PROMPT, 10 * SAMPLES, TOKENS, **SHARP)[0] for _ in range(2))
    stock.close()
    assert 4 < len(set(control)) < SAMPLES, "a test of the distribution needs some frequent outcomes"
    engine = start_interpreted(
        small_vocabulary,
        runner="1",
        async_scheduling=True,
        speculative_config={"method": "ngram_gpu", "num_speculative_tokens": nodes},
        additional_config={"pilotfish": {"drafter": {"name": "token_recycling", "verification": verification}}},
        **arguments,
    )
    sampled, num_drafted = draw(engine, PROMPT, SAMPLES, TOKENS, **SHARP)
    engine.close()
    assert num_drafted > SAMPLES / 4, "the test needs drafts"
    assert_same_distribution(control, again, sampled)
