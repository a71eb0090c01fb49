"""Tests of Quest: its options, the roles of layers, and the bounds of pages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.reference import attention
from pilotfish.kvcache.selection import PAGE_SIZE, Role
from pilotfish.plugins.config import ConfigError, build_options
from pilotfish.plugins.contracts import Engine, Unsupported
from pilotfish.plugins.quest import Quest, QuestOptions

ENGINE = Engine("m", 1000, 8192, 8, layers=6, kv_heads=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget: expected 1 to"),
        ({"budget": 100}, "budget: expected a multiple of 32"),
        ({"budget": 128, "recent": 128}, "budget: expected at least"),
        ({"full_layers": -1}, "full_layers: expected 0 to"),
        ({"head_aggregation": "union"}, "head_aggregation: expected one of 'kv_head', 'head', 'sum', 'max'"),
        ({"page": 16}, "pilotfish.kv.page: unknown"),
    ],
)
def test_refuses_options_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_options(QuestOptions, values, "pilotfish.kv")


def test_first_layers_compute_full_attention() -> None:
    plan = Quest(QuestOptions(), ENGINE).read_plan()
    assert plan.roles == (Role.FULL,) * 2 + (Role.PAGE_BOUNDS,) * 4
    assert (plan.rule.budget, plan.rule.recent, plan.rule.granularity) == (512, 64, "page")


def test_layers_without_full_attention_are_left_alone() -> None:
    hybrid = Engine("m", 1000, 8192, 8, layers=6, full_attention_layers=(1, 3, 5))
    roles = Quest(QuestOptions(full_layers=2), hybrid).read_plan().roles
    assert [i for i, role in enumerate(roles) if role is Role.PAGE_BOUNDS] == [3, 5]


@pytest.mark.parametrize(
    ("options", "engine", "reason"),
    [
        (QuestOptions(full_layers=6), ENGINE, "no layer would select pages: with full_layers=6"),
        (QuestOptions(), Engine("m", 1000, 8192, 8, layers=6, full_attention_layers=()), "no layer would select"),
        (QuestOptions(), Engine("m", 1000, 8192, 8, layers=6, device="cuda"), "on CPUs only"),
    ],
)
def test_refuses_engines_without_effect_or_support(options: QuestOptions, engine: Engine, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Quest.check(options, engine)


@given(st.integers(1, 200), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**31))
@settings(deadline=None)
def test_no_token_exceeds_the_bound_of_its_page(context: int, kv_heads: int, share: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, query = rng.normal(size=(context, kv_heads, 8)), rng.normal(size=(kv_heads * share, 8))
    logits, _ = attention(query, keys, keys, 0.5)
    bounds = Quest.bound_logits(query, Quest.page_bounds(keys), 0.5)
    for token in range(context):
        assert (logits[:, token] <= bounds[:, token // PAGE_SIZE] + 1e-9).all()


def test_bound_of_a_single_token_is_its_product() -> None:
    rng = np.random.default_rng(1)
    keys, query = rng.normal(size=(PAGE_SIZE + 1, 1, 8)), rng.normal(size=(2, 8))
    logits, _ = attention(query, keys, keys, 1.0)
    np.testing.assert_allclose(Quest.bound_logits(query, Quest.page_bounds(keys), 1.0)[:, 1], logits[:, -1])
