"""The sampling distribution with speculation equals the one without, tested on thousands of short samples.

Two runs without speculation are the control: their difference is chance.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chi2_contingency

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SAMPLES, TOKENS, LEVEL = 400, 3, 1e-4
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
            drawn[key] = draw(stock, count, settings)[0], draw(stock, count, settings)[0]
        return drawn[key]

    return control


def draw(engine, count: int, settings: dict) -> tuple[list[tuple[int, ...]], int]:
    """Draw ``count`` samples of the prompt; returns them and the number of draft tokens."""
    sampling = {"temperature": 1.0, "max_tokens": TOKENS + 1, "ignore_eos": True, **settings}
    answer = engine.ask(do="sample", prompts=[PROMPT] * count, sampling=[sampling] * count)
    return [tuple(t[:TOKENS]) for t in answer["tokens"]], answer["drafted"]


def p_value(one: list, other: list) -> float:
    """Return the p-value of a chi-square test of two samples; rare outcomes are merged."""
    a, b = Counter(one), Counter(other)
    frequent = [x for x in a.keys() | b.keys() if a[x] + b[x] >= 12]
    table = np.array([[c[x] for x in frequent] + [c.total() - sum(c[x] for x in frequent)] for c in (a, b)])
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] < 2 else chi2_contingency(table).pvalue  # type: ignore[attr-defined]


@pytest.mark.long  # text of seeded requests equals stock's, which `test_seeds.py` tests, implies it
@pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in SETTINGS.items()])
@pytest.mark.shows("token_recycling", "sampling")
def test_distribution_is_unchanged(controls, drafted, settings: dict) -> None:
    count = SAMPLES if not settings else SAMPLES // 2
    control, again = controls(count, settings)
    sampled, num_drafted = draw(drafted, count, settings)
    assert num_drafted > count / 4, "the test needs drafts"
    for position in range(TOKENS):
        at = [[s[position] for s in sample] for sample in (control, again, sampled)]
        assert p_value(at[0], at[1]) > LEVEL, "the two control samples differ"
        assert p_value(at[0] + at[1], at[2]) > LEVEL, f"token {position + 1}"
    assert p_value(control + again, sampled) > LEVEL, "joint distribution"


def test_biased_sampler_is_detected() -> None:
    """Test that a sampler that takes the most likely outcome in one of ten draws is detected."""
    rng = np.random.default_rng(0)
    p = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    biased = 0.9 * p + 0.1 * np.eye(5)[0]
    one, other = rng.choice(5, 4000, p=p).tolist(), rng.choice(5, 2000, p=biased).tolist()
    assert p_value(one, other) < LEVEL
    assert p_value(one, rng.choice(5, 2000, p=p).tolist()) > LEVEL
