import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.drafting.draft_length import (
    AcceptanceRecord,
    StepCostModel,
    _solve_nonnegative,
    allocate_draft_tokens,
)


def cost_of(base: float, slope: float) -> Callable[[int, Any], Any]:
    return lambda requests, drafted: base + slope * drafted


falling = st.lists(st.floats(0.01, 1.0), max_size=4).map(lambda x: np.cumprod(x).astype(np.float32))


@settings(deadline=None)
@given(st.lists(falling, min_size=1, max_size=3), st.floats(0.0, 0.5))
def test_allocation_is_the_best_of_all(scores: list[np.ndarray], slope: float) -> None:
    cost = cost_of(1.0, slope)

    def rate(lengths: tuple[int, ...]) -> float:
        gain = len(scores) + sum(float(s[:n].astype(np.float64).sum()) for s, n in zip(scores, lengths, strict=True))
        return gain / float(cost(len(scores), sum(lengths)))

    chosen = allocate_draft_tokens(scores, cost)
    assert all(0 <= n <= len(s) for n, s in zip(chosen, scores, strict=True))
    best = max(rate(lengths) for lengths in itertools.product(*(range(len(s) + 1) for s in scores)))
    assert rate(tuple(chosen)) == pytest.approx(best)


def test_dear_tokens_are_not_drafted_and_free_ones_are() -> None:
    scores = [np.array([0.3, 0.1], np.float32)]
    assert allocate_draft_tokens(scores, cost_of(0.001, 1.0)) == [0]
    assert allocate_draft_tokens(scores, cost_of(1.0, 0.0)) == [2]
    assert allocate_draft_tokens([], cost_of(1.0, 0.1)) == []


def test_the_plane_is_found_through_noise_and_outliers() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel(slope=0.5)
    for _ in range(1500):
        b, d = int(rng.integers(1, 9)), int(rng.integers(0, 20))
        seconds = (0.040 + 0.010 * b + 0.002 * d) * rng.normal(1.0, 0.03)
        cost.observe(b, d, seconds * (10 if rng.random() < 0.05 else 1))
    for requests in (2, 4, 8):
        without, per_token, _ = cost.coefficients(requests)
        assert without == pytest.approx(0.040 + 0.010 * requests, rel=0.1)
        assert per_token == pytest.approx(0.002, rel=0.25)


def test_requests_and_tokens_are_told_apart() -> None:
    """One request with long drafts, then eight with short ones: dear requests must not make tokens look dear."""
    rng, cost = np.random.default_rng(0), StepCostModel()
    for b, longest in ((1, 12), (8, 16)):
        for _ in range(300):
            d = int(rng.integers(0, longest))
            cost.observe(b, d, 0.03 + 0.012 * b + 0.001 * d)
    assert cost.coefficients(8)[1] == pytest.approx(0.001, rel=0.25)


def test_tokens_may_be_cheap_for_one_request_and_dear_for_eight() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel()
    for b, slope in ((1, 0.001), (8, 0.004)):
        for _ in range(400):
            d = int(rng.integers(0, 16))
            cost.observe(b, d, 0.03 + 0.003 * b + slope * d)
    assert cost.coefficients(8)[:2] == (pytest.approx(0.054, rel=0.1), pytest.approx(0.004, rel=0.15))
    assert cost.coefficients(1)[:2] == (pytest.approx(0.033, rel=0.1), pytest.approx(0.001, rel=0.5))
    assert cost.coefficients(64)[1] == pytest.approx(0.004, rel=0.15), "beyond all that was seen, the nearest tells"


def test_a_changed_machine_is_noticed() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel()
    for slope in (0.001, 0.01):
        for _ in range(1500):
            d = int(rng.integers(0, 16))
            cost.observe(1, d, 0.03 + slope * d)
    assert cost.coefficients(1)[1] == pytest.approx(0.01, rel=0.25)


def test_without_drafts_the_prior_stands() -> None:
    cost = StepCostModel(slope=0.05)
    for _ in range(100):
        cost.observe(1, 0, 0.02)
    without, per_token, _ = cost.coefficients(1)
    assert per_token / without == pytest.approx(0.05, rel=0.05)
    cost.observe(0, 0, 1.0)
    cost.observe(1, -1, 1.0)
    cost.observe(1, 0, 0.0)
    assert cost.steps == 100


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3000), st.floats(1e-4, 10)), max_size=80))
def test_costs_stay_positive_and_memory_bounded(steps: list[tuple[int, int, float]]) -> None:
    cost = StepCostModel()
    for step in steps:
        cost.observe(*step)
        without, per_token, _ = cost.coefficients(step[0])
        assert without > 0
        assert per_token >= 0
    assert len(cost._cells) <= StepCostModel.MAX_CELLS


def test_a_measured_shape_says_where_tokens_stop_being_free() -> None:
    """A machine that verifies 32 rows in the time of one, and pays for each row behind them."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 32, 64], [0.010, 0.0101, 0.0201])
    assert cost(1, 31) / cost(1, 0) == pytest.approx(1.01)
    assert cost(1, 63) / cost(1, 0) == pytest.approx(2.01)
    assert cost(1, 95) / cost(1, 0) == pytest.approx(3.01), "behind what was measured it goes on as it was"
    scores = [np.full(64, 0.1, np.float32)]
    assert allocate_draft_tokens(scores, cost) == [31]
    for d in (0, 10, 31, 50) * 20:
        cost.observe(1, d, 2 * (0.010 + 0.0003125 * max(0, d - 31)))  # twice as slow, of the same shape
    assert allocate_draft_tokens(scores, cost) == [31]
    assert cost(1, 63) == pytest.approx(0.040, rel=0.1)


def test_small_drafts_do_not_say_that_large_ones_are_dear() -> None:
    """Up to eight rows cost next to nothing by the shape; that real steps differ there by overheads tells little."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 8, 12, 16, 24, 32], [0.0300, 0.0305, 0.033, 0.038, 0.048, 0.058])
    rng = np.random.default_rng(0)
    for _ in range(400):
        d = int(rng.integers(2, 9))
        cost.observe(1, d, 0.038 + 0.0007 * d)
    assert cost(1, 23) / cost(1, 0) < 2.0, "the shape says 1.6"


def test_what_the_shape_leaves_out_is_learned_by_the_token() -> None:
    """The model alone verifies six rows as fast as one; attention and sampling do not."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 6, 24], [0.020, 0.020, 0.060])
    assert allocate_draft_tokens([np.full(20, 0.05, np.float32)], cost) == [5]
    for d in (0, 1, 2, 5, 12) * 40:
        shape = float(np.interp(1 + d, [1, 6, 24], [0.020, 0.020, 0.060]))
        cost.observe(1, d, shape + 0.002 * d)
    assert cost(1, 5) / cost(1, 0) == pytest.approx(1.5, rel=0.15)
    assert allocate_draft_tokens([np.full(20, 0.05, np.float32)], cost) == [0]


@pytest.mark.parametrize(("base", "slope"), [(0.025, 0.0005), (0.010, 0.0001), (0.030, 0.002)])
def test_a_shape_that_says_too_much_or_too_little_is_corrected(base: float, slope: float) -> None:
    """Shapes are proportions of the bare model; real steps have a larger fixed part, and slopes of their own."""
    rng, cost = np.random.default_rng(0), StepCostModel()
    cost.set_latency_profile([1, 4, 8, 16, 32], [0.0105, 0.012, 0.014, 0.018, 0.026])
    for _ in range(3000):
        d = int(rng.integers(0, 13))
        cost.observe(1, d, (base + slope * d) * rng.normal(1.0, 0.02))
    for d in (0, 4, 12):
        assert cost(1, d) == pytest.approx(base + slope * d, rel=0.05)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=3, max_size=8), st.integers(0, 99))
def test_coefficients_are_not_negative_and_no_worse_than_others(rows: list[list[float]], seed: int) -> None:
    x = np.array(rows)
    y = np.random.default_rng(seed).normal(size=len(x))
    gram, target = x.T @ x + 0.1 * np.eye(3), x.T @ y
    found = _solve_nonnegative(gram, target)
    assert (found >= 0).all()

    def loss(b: np.ndarray) -> float:
        return float(b @ gram @ b - 2 * b @ target)

    assert loss(found) <= loss(np.maximum(np.linalg.solve(gram, target), 0)) + 1e-9, "better than cutting off"
    assert loss(found) <= 1e-9, "and than none at all"


def test_a_request_that_gets_no_drafts_is_tried_again() -> None:
    """Beside fifteen others whose drafts hold, one whose first draft failed comes back."""
    scores = np.array([0.9, 0.82, 0.75, 0.7], np.float32)
    records = [AcceptanceRecord() for _ in range(16)]
    drafted = []
    for step in range(300):
        sizes = allocate_draft_tokens([r.factor * scores for r in records], lambda b, d: 1 + 0.02 * d)
        for i, (record, size) in enumerate(zip(records, sizes, strict=True)):
            record.observe(scores[:size], 0 if i == 0 and step < 5 else size)
        drafted.append(sizes[0])
    assert 0 in drafted[:60] and sum(drafted[60:]) > 200 * 3


def test_a_request_whose_drafts_fail_is_believed_less_and_wins_trust_back() -> None:
    record, scores = AcceptanceRecord(), np.array([0.8, 0.6, 0.4], np.float32)
    assert record.factor == 1.0
    for _ in range(20):
        record.observe(scores, 0)
    assert record.factor == AcceptanceRecord.LOW
    for _ in range(200):
        record.observe(scores, 2)
    assert record.factor == 1.0, "more than was expected does not raise scores above what all requests say"


@given(st.lists(st.tuples(falling, st.integers(0, 4)), max_size=60))
def test_trust_stays_within_bounds(steps: list[tuple[np.ndarray, int]]) -> None:
    record = AcceptanceRecord()
    for scores, accepted in steps:
        record.observe(scores, min(accepted, len(scores)))
        assert AcceptanceRecord.LOW <= record.factor <= 1.0
