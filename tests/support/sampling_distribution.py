"""Samples of an engine, and a test of whether two samples have the same distribution."""

from collections import Counter
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency

LEVEL = 1e-4


def draw(engine: Any, prompt: Any, count: int, tokens: int, **settings: Any) -> tuple[list[tuple[int, ...]], int]:
    """Draw samples of a prompt.

    Args:
        engine: The engine.
        prompt: Text, or token ids.
        count: Number of samples.
        tokens: Number of tokens of each that are kept.
        settings: Sampling parameters.

    Returns:
        The samples, and the number of draft tokens.
    """
    sampling = {"temperature": 1.0, "max_tokens": tokens + 1, "ignore_eos": True, **settings}
    answer = engine.ask(do="sample", prompts=[prompt] * count, sampling=[sampling] * count)
    return [tuple(t[:tokens]) for t in answer["tokens"]], answer["drafted"]


def p_value(one: list, other: list) -> float:
    """Return the p-value of a chi-square test of two samples; rare outcomes are merged."""
    a, b = Counter(one), Counter(other)
    frequent = [x for x in a.keys() | b.keys() if a[x] + b[x] >= 12]
    table = np.array([[c[x] for x in frequent] + [c.total() - sum(c[x] for x in frequent)] for c in (a, b)])
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] < 2 else chi2_contingency(table).pvalue  # type: ignore[attr-defined]


def assert_same_distribution(control: list, again: list, sampled: list) -> None:
    """Assert that a sample has the distribution of two control samples, at each position and jointly."""
    for position in range(len(control[0])):
        at = [[s[position] for s in sample] for sample in (control, again, sampled)]
        assert p_value(at[0], at[1]) > LEVEL, "the two control samples differ"
        assert p_value(at[0] + at[1], at[2]) > LEVEL, f"token {position + 1}"
    assert p_value(control + again, sampled) > LEVEL, "joint distribution"
