"""Tests of the allocation of draft tokens, the step cost model and the acceptance record of a request."""

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
def test_allocation_matches_exhaustive_search(scores: list[np.ndarray], slope: float) -> None:
    cost = cost_of(1.0, slope)

    def rate(lengths: tuple[int, ...]) -> float:
        gain = len(scores) + sum(float(s[:n].astype(np.float64).sum()) for s, n in zip(scores, lengths, strict=True))
        return gain / float(cost(len(scores), sum(lengths)))

    allocated = allocate_draft_tokens(scores, cost)
    assert all(0 <= n <= len(s) for n, s in zip(allocated, scores, strict=True))
    best = max(rate(lengths) for lengths in itertools.product(*(range(len(s) + 1) for s in scores)))
    assert rate(tuple(allocated)) == pytest.approx(best)


def test_expensive_tokens_are_not_drafted_and_free_tokens_are() -> None:
    scores = [np.array([0.3, 0.1], np.float32)]
    assert allocate_draft_tokens(scores, cost_of(0.001, 1.0)) == [0]
    assert allocate_draft_tokens(scores, cost_of(1.0, 0.0)) == [2]
    assert allocate_draft_tokens([], cost_of(1.0, 0.1)) == []


def test_the_most_probable_tokens_of_the_batch_share_a_limit() -> None:
    scores = [np.array([0.9, 0.5], np.float32), np.array([0.8, 0.7, 0.6], np.float32)]
    assert allocate_draft_tokens(scores, cost_of(1.0, 0.0)) == [2, 3]
    assert allocate_draft_tokens(scores, cost_of(1.0, 0.0), 3) == [1, 2]
    assert allocate_draft_tokens(scores, cost_of(1.0, 0.0), 0) == [0, 0]


def test_cost_model_fits_noisy_data_with_outliers() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel(slope=0.5)
    for _ in range(1500):
        b, d = int(rng.integers(1, 9)), int(rng.integers(0, 20))
        seconds = (0.040 + 0.010 * b + 0.002 * d) * rng.normal(1.0, 0.03)
        cost.observe(b, d, seconds * (10 if rng.random() < 0.05 else 1))
    for requests in (2, 4, 8):
        without, per_token, _ = cost.coefficients(requests)
        assert without == pytest.approx(0.040 + 0.010 * requests, rel=0.1)
        assert per_token == pytest.approx(0.002, rel=0.25)


def test_costs_of_requests_and_tokens_are_separated() -> None:
    """Test with one request and long drafts, then eight requests and short drafts."""
    rng, cost = np.random.default_rng(0), StepCostModel()
    for b, longest in ((1, 12), (8, 16)):
        for _ in range(300):
            d = int(rng.integers(0, longest))
            cost.observe(b, d, 0.03 + 0.012 * b + 0.001 * d)
    assert cost.coefficients(8)[1] == pytest.approx(0.001, rel=0.25)


def test_token_cost_depends_on_batch_size() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel()
    for b, slope in ((1, 0.001), (8, 0.004)):
        for _ in range(400):
            d = int(rng.integers(0, 16))
            cost.observe(b, d, 0.03 + 0.003 * b + slope * d)
    assert cost.coefficients(8)[:2] == (pytest.approx(0.054, rel=0.1), pytest.approx(0.004, rel=0.15))
    assert cost.coefficients(1)[:2] == (pytest.approx(0.033, rel=0.1), pytest.approx(0.001, rel=0.5))
    assert cost.coefficients(64)[1] == pytest.approx(0.004, rel=0.15), (
        "beyond the observed batch sizes, the nearest one is used"
    )


def test_cost_model_follows_changed_step_times() -> None:
    rng, cost = np.random.default_rng(0), StepCostModel()
    for slope in (0.001, 0.01):
        for _ in range(1500):
            d = int(rng.integers(0, 16))
            cost.observe(1, d, 0.03 + slope * d)
    assert cost.coefficients(1)[1] == pytest.approx(0.01, rel=0.25)


def test_prior_slope_is_used_without_drafts() -> None:
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
def test_costs_are_positive_and_memory_is_bounded(steps: list[tuple[int, int, float]]) -> None:
    cost = StepCostModel()
    for step in steps:
        cost.observe(*step)
        without, per_token, _ = cost.coefficients(step[0])
        assert without > 0
        assert per_token >= 0
    assert len(cost._cells) <= StepCostModel.MAX_CELLS


def test_latency_profile_limits_draft_length() -> None:
    """Test with a machine that verifies up to 32 query tokens in the time of one."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 32, 64], [0.010, 0.0101, 0.0201])
    assert cost(1, 31) / cost(1, 0) == pytest.approx(1.01)
    assert cost(1, 63) / cost(1, 0) == pytest.approx(2.01)
    assert cost(1, 95) / cost(1, 0) == pytest.approx(3.01), "the profile is extrapolated with its last slope"
    scores = [np.full(64, 0.1, np.float32)]
    assert allocate_draft_tokens(scores, cost) == [31]
    for d in (0, 10, 31, 50) * 20:
        cost.observe(1, d, 2 * (0.010 + 0.0003125 * max(0, d - 31)))  # twice as slow, with the same profile
    assert allocate_draft_tokens(scores, cost) == [31]
    assert cost(1, 63) == pytest.approx(0.040, rel=0.1)


def test_small_drafts_do_not_raise_cost_of_large_drafts() -> None:
    """Test that the overheads of small drafts do not change the estimated cost of large ones."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 8, 12, 16, 24, 32], [0.0300, 0.0305, 0.033, 0.038, 0.048, 0.058])
    rng = np.random.default_rng(0)
    for _ in range(400):
        d = int(rng.integers(2, 9))
        cost.observe(1, d, 0.038 + 0.0007 * d)
    assert cost(1, 23) / cost(1, 0) < 2.0, "the profile predicts 1.6"


def test_costs_missing_from_latency_profile_are_learned() -> None:
    """Test with a profile of free tokens, while attention and sampling take time for each token."""
    cost = StepCostModel()
    cost.set_latency_profile([1, 6, 24], [0.020, 0.020, 0.060])
    assert allocate_draft_tokens([np.full(20, 0.05, np.float32)], cost) == [5]
    for d in (0, 1, 2, 5, 12) * 40:
        profile = float(np.interp(1 + d, [1, 6, 24], [0.020, 0.020, 0.060]))
        cost.observe(1, d, profile + 0.002 * d)
    assert cost(1, 5) / cost(1, 0) == pytest.approx(1.5, rel=0.15)
    assert allocate_draft_tokens([np.full(20, 0.05, np.float32)], cost) == [0]


@pytest.mark.parametrize(("base", "slope"), [(0.025, 0.0005), (0.010, 0.0001), (0.030, 0.002)])
def test_wrong_latency_profile_is_corrected(base: float, slope: float) -> None:
    """Test with profiles of the bare model only, while real steps have a larger fixed cost and other slopes."""
    rng, cost = np.random.default_rng(0), StepCostModel()
    cost.set_latency_profile([1, 4, 8, 16, 32], [0.0105, 0.012, 0.014, 0.018, 0.026])
    for _ in range(3000):
        d = int(rng.integers(0, 13))
        cost.observe(1, d, (base + slope * d) * rng.normal(1.0, 0.02))
    for d in (0, 4, 12):
        assert cost(1, d) == pytest.approx(base + slope * d, rel=0.05)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=3, max_size=8), st.integers(0, 99))
def test_nonnegative_solver_is_no_worse_than_clipping(rows: list[list[float]], seed: int) -> None:
    x = np.array(rows)
    y = np.random.default_rng(seed).normal(size=len(x))
    gram, target = x.T @ x + 0.1 * np.eye(3), x.T @ y
    solution = _solve_nonnegative(gram, target)
    assert (solution >= 0).all()

    def loss(b: np.ndarray) -> float:
        return float(b @ gram @ b - 2 * b @ target)

    assert loss(solution) <= loss(np.maximum(np.linalg.solve(gram, target), 0)) + 1e-9, (
        "better than clipping negative coefficients"
    )
    assert loss(solution) <= 1e-9, "better than all zeros"


def test_request_without_drafts_is_tried_again() -> None:
    """Test that a request whose first drafts are rejected gets drafts again, in a batch with 15 accepted ones."""
    scores = np.array([0.9, 0.82, 0.75, 0.7], np.float32)
    records = [AcceptanceRecord() for _ in range(16)]
    drafted = []
    for step in range(300):
        sizes = allocate_draft_tokens([r.factor * scores for r in records], lambda b, d: 1 + 0.02 * d)
        for i, (record, size) in enumerate(zip(records, sizes, strict=True)):
            record.observe(scores[:size], 0 if i == 0 and step < 5 else size)
        drafted.append(sizes[0])
    assert 0 in drafted[:60] and sum(drafted[60:]) > 200 * 3


def test_acceptance_factor_falls_and_recovers() -> None:
    record, scores = AcceptanceRecord(), np.array([0.8, 0.6, 0.4], np.float32)
    assert record.factor == 1.0
    for _ in range(20):
        record.observe(scores, 0)
    assert record.factor == AcceptanceRecord.LOW
    for _ in range(200):
        record.observe(scores, 2)
    assert record.factor == 1.0, "a high acceptance rate never raises the factor above 1"


@given(st.lists(st.tuples(falling, st.integers(0, 4)), max_size=60))
def test_acceptance_factor_stays_within_bounds(steps: list[tuple[np.ndarray, int]]) -> None:
    record = AcceptanceRecord()
    for scores, accepted in steps:
        record.observe(scores, min(accepted, len(scores)))
        assert AcceptanceRecord.LOW <= record.factor <= 1.0
