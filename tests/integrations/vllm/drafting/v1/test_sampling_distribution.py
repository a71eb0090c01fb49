"""The sampling distribution with speculation equals the one without, tested on thousands of short samples.

Two runs without speculation are the control: their difference is chance.
"""

from collections.abc import Callable

import numpy as np
import pytest
from sampling_distribution import LEVEL, assert_same_distribution, draw, p_value

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SAMPLES, TOKENS = 400, 3
PROMPT = "The three primary colours are red, blue and yellow. My favourite colour is"
SETTINGS = {"plain": {}, "top_p": {"top_p": 0.9}, "top_k": {"top_k": 20, "temperature": 0.7}}


@pytest.fixture(scope="module")
def stock(start, model):
    return start(model, max_num_seqs=64, enable_prefix_caching=True)


@pytest.fixture(scope="module", params=["chain", "tree"])
def drafted(request, start, model, drafting_args):
    drafter = drafting_args(4) if request.param == "chain" else drafting_args(5, verification="tree")
    engine = start(model, max_num_seqs=64, enable_prefix_caching=True, seed=7, **drafter)
    engine.ask(do="draft_always")  # even where drafting does not reduce latency
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def controls(stock) -> Callable[[int, dict], tuple[list, list]]:
    """Return a function that draws two samples of stock vLLM, once for all drafters."""
    drawn: dict[str, tuple[list, list]] = {}

    def control(count: int, settings: dict) -> tuple[list, list]:
        key = repr(settings)
        if key not in drawn:
            drawn[key] = (
                draw(stock, PROMPT, count, TOKENS, **settings)[0],
                draw(stock, PROMPT, count, TOKENS, **settings)[0],
            )
        return drawn[key]

    return control


@pytest.mark.long  # text of seeded requests equals stock's, which `test_seeds.py` tests, implies it
@pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in SETTINGS.items()])
@pytest.mark.shows("token_recycling", "sampling")
def test_distribution_is_unchanged(controls, drafted, settings: dict) -> None:
    count = SAMPLES if not settings else SAMPLES // 2
    control, again = controls(count, settings)
    sampled, num_drafted = draw(drafted, PROMPT, count, TOKENS, **settings)
    assert num_drafted > count / 4, "the test needs drafts"
    assert_same_distribution(control, again, sampled)


def test_biased_sampler_is_detected() -> None:
    """Test that a sampler that takes the most likely outcome in one of ten draws is detected."""
    rng = np.random.default_rng(0)
    p = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    biased = 0.9 * p + 0.1 * np.eye(5)[0]
    one, other = rng.choice(5, 4000, p=p).tolist(), rng.choice(5, 2000, p=biased).tolist()
    assert p_value(one, other) < LEVEL
    assert p_value(one, rng.choice(5, 2000, p=p).tolist()) > LEVEL
