"""Geometric means over prompts with bootstrap confidence intervals, and paired comparisons of arms."""

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000


def bootstrap_interval(ratios: ArrayLike) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and the bounds of its 95 % bootstrap confidence interval over prompts.

    Args:
        ratios: [prompts] ratios, one for each prompt.
    """
    logs = np.log(np.asarray(ratios, np.float64))
    rng = np.random.default_rng(0)
    means = logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))].mean(1)
    low, high = np.exp(np.quantile(means, (0.025, 0.975)))
    return float(np.exp(logs.mean())), float(low), float(high)


def compare_paired(ratios: ArrayLike, others: ArrayLike) -> str:
    """Return the mean of ``ratios / others`` as "mean (low to high)", marked "tie" if the interval contains 1."""
    mean, low, high = bootstrap_interval(np.asarray(ratios, np.float64) / np.asarray(others, np.float64))
    verdict = "tie, " if low <= 1 <= high else ""
    return f"{verdict}{mean:.2f} ({low:.2f} to {high:.2f})"
