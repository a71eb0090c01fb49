"""Token budgets: how many tokens each part of an image keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contracts import ImageLayout, PrunePlan

if TYPE_CHECKING:
    from torch import Tensor

MIN_RETAIN = 0.01
MIN_TEMPERATURE = 1e-6  # scores divided by less overflow


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that scores cannot be divided by.

    Raises:
        ValueError: The temperature is out of range.
    """
    if not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of {MIN_TEMPERATURE} or more, got {temperature}")


def check_retain(retain: float) -> None:
    """Refuse a share outside the valid range.

    Raises:
        ValueError: The share is out of range.
    """
    if not MIN_RETAIN <= retain <= 1:
        raise ValueError(f"retain: expected a share from {MIN_RETAIN} to 1, got {retain}")


def plan_tokens(layout: ImageLayout, retain: float) -> PrunePlan:
    """Plan the same share of each view before the grid (at least one token) and of the grid, and all newlines."""
    parts = {
        "base_view": layout.frames * max(1, int(layout.side * layout.side * retain)),
        "crops": int(layout.grid_tokens * retain),
        "newlines": layout.num_newlines,
    }
    return PrunePlan(sum(parts.values()), parts)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` highest of [n] scores, the highest first; of equal scores the earlier."""
    return scores.sort(descending=True, stable=True).indices[:count]


def allocate_tokens(sizes: Sequence[int], wanted: Sequence[float], total: int) -> list[int]:
    """Round wanted token counts to integers that sum to ``total``, by the largest remainder.

    Args:
        sizes: Number of tokens that each part has, which its count does not exceed.
        wanted: Number of tokens that each part should keep, a fraction.
        total: Sum of the counts; at most the sum of the sizes.
    """
    counts = [min(int(w), n) for w, n in zip(wanted, sizes, strict=True)]
    step = 1 if sum(counts) < total else -1
    while sum(counts) != total:
        open_to = [i for i in range(len(counts)) if (counts[i] < sizes[i] if step > 0 else counts[i] > 0)]
        open_to.sort(key=lambda i: step * (wanted[i] - counts[i]), reverse=True)
        for i in open_to[: abs(total - sum(counts))]:
            counts[i] += step
    return counts
