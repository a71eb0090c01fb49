"""Tests of the number of draft tokens for all requests of a step, with simulated engines."""

from collections.abc import Callable

import numpy as np
import pytest

from pilotfish.plugins.drafting.batch_draft_length import BatchDraftLength, _extrapolate
from pilotfish.plugins.drafting.draft_length import StepCostModel

SCHEDULE = [0] + [12] * 14 + [5] * 18 + [2] * 32 + [1] * 32 + [0] * 160
LENGTHS = (0, 1, 2, 5, 12)
Step = Callable[[int, int], float]


def seconds_of(memory_bound: int, overhead: float = 0.0) -> Step:
    """Return the duration of a step: constant up to some number of tokens, then linear, and a cost of drafting."""
    return lambda b, k: 0.01 * max(1.0, b * (k + 1) / memory_bound) * (1 + overhead * (k > 0))


def simulate(
    step: Step, rate: float, num_requests: int, steps: int = 3000, noise: float = 0.03, seed: int = 0
) -> tuple[float, BatchDraftLength]:
    """Return the speed of an engine relative to one without drafts, after it has learned."""
    random = np.random.default_rng(seed)
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 4096)
    tokens = taken = 0.0
    for i in range(steps):
        k = lengths[num_requests]
        accepted = sum(int(np.cumprod(random.random(k) < rate).sum()) for _ in range(num_requests)) if k else 0
        seconds = step(num_requests, k) * (1 + noise * random.random() + (random.random() < 0.02))
        lengths.observe(num_requests, k, accepted, seconds)
        if i >= steps // 3:
            tokens, taken = tokens + num_requests + accepted, taken + step(num_requests, k)
    return tokens / taken / (num_requests / step(num_requests, 0)), lengths


def best(step: Step, rate: float, b: int) -> float:
    """Return the largest speed of any fixed number of draft tokens."""
    gains = [(1 + sum(rate**i for i in range(1, k + 1))) * step(b, 0) / step(b, k) for k in LENGTHS]
    return max(gains)


@pytest.mark.parametrize("num_requests", [1, 8, 200])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.8])
@pytest.mark.parametrize("memory_bound", [4, 64, 512])
def test_never_slower_than_stock_by_more_than_2_percent(memory_bound: int, rate: float, num_requests: int) -> None:
    step = seconds_of(memory_bound, overhead=0.01)
    steps = 2000 if num_requests <= 8 else 1000
    speed, _ = simulate(step, rate, num_requests, steps)
    assert speed >= 0.98
    assert speed >= 0.85 * best(step, rate, num_requests)


def test_the_schedule_holds_until_steps_were_observed() -> None:
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 4096)
    assert [lengths[b] for b in (1, 14, 15, 64, 96, 97)] == [12, 12, 5, 2, 1, 0]
    assert len(lengths) == len(SCHEDULE)
    assert lengths.choices == list(LENGTHS)


def test_acceptance_that_returns_is_noticed() -> None:
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 4096)
    step, chosen = seconds_of(32), []
    for i in range(6000):
        k = lengths[4]
        lengths.observe(4, k, 4 * k if i >= 3000 else 0, step(4, k))
        chosen.append(k)
    assert np.mean(chosen[2000:3000]) < 0.2  # trials only
    assert np.mean(chosen[5000:]) > 4


def test_steps_of_unknown_duration_teach_acceptance() -> None:
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 4096)
    for _ in range(50):
        lengths.observe(2, 12, 24, None)
    assert lengths.cost.steps == 0
    assert lengths.expected_accepted()[-1] == pytest.approx(12)
    assert lengths[2] == 12


def test_a_trial_ends_and_is_not_made_where_it_would_be_slow() -> None:
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 512)
    step = seconds_of(192)
    for i in range(2000):
        k = (0, 12)[i // 2 % 2]
        lengths.observe(1, k, k // 12 * 3, step(1, k))
        lengths.observe(64, k, 64 * (k // 12) * 3, step(64, k))
    lengths._probe = (lengths.choices.index(12), 4)
    assert lengths[64] < 12
    assert [lengths[1] for _ in range(3)] == [12, 12, 12]
    assert lengths._probe is None
    assert all(b * (1 + lengths[b]) <= 512 for b in range(1, 250) if lengths[b])


def test_a_step_that_compiles_kernels_is_no_measure() -> None:
    lengths = BatchDraftLength(SCHEDULE, StepCostModel(), 192, 512)
    for _ in range(50):
        lengths.observe(1, 0, 0, 0.01)
    lengths.observe(1, 12, 10, 5.0)
    assert float(lengths.cost(1, 12)) < 0.05


def test_extrapolation_follows_a_chain() -> None:
    for rate in (0.1, 0.5, 0.9):
        mean = [sum(rate**i for i in range(1, n + 1)) for n in (2, 12)]
        assert _extrapolate(mean[0], 2, 12) == pytest.approx(mean[1], rel=1e-5)
        assert _extrapolate(mean[1], 12, 2) == pytest.approx(mean[0], rel=1e-5)
    assert _extrapolate(3.0, 3, 12) == pytest.approx(12)
    assert _extrapolate(0.0, 3, 12) == pytest.approx(0, abs=1e-6)
