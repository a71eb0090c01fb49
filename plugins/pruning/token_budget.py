"""How many tokens each part keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contracts import ImageLayout, PrunePlan

if TYPE_CHECKING:
    from torch import Tensor

MIN_RETAIN = 0.01  # share
MIN_TEMPERATURE = 1e-6  # temperature: divided by less, scores overflow


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that nothing can be divided by.

    Raises:
        ValueError: it is out of range.
    """
    if not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of {MIN_TEMPERATURE} or more, got {temperature}")


def check_retain(retain: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: it is out of range.
    """
    if not MIN_RETAIN <= retain <= 1:
        raise ValueError(f"retain: expected a share from {MIN_RETAIN} to 1, got {retain}")


def plan_tokens(layout: ImageLayout, retain: float) -> PrunePlan:
    """The same share of each view before the grid, of which one token stays at least, and of the grid; all newlines."""
    parts = {
        "thumbnail": layout.frames * max(1, int(layout.side * layout.side * retain)),
        "crops": int(layout.grid_tokens * retain),
        "newlines": layout.num_newlines,
    }
    return PrunePlan(sum(parts.values()), parts)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` highest of [n] scores, the highest first; of equal ones the earlier."""
    return scores.sort(descending=True, stable=True).indices[:count]


def allocate_tokens(sizes: Sequence[int], wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total`` and lie close to what is wanted, none above its size (largest remainder).

    Args:
        sizes: What each part has.
        wanted: What each part should keep, not whole numbers.
        total: What all keep together; no more than there is.
    """
    counts = [min(int(w), n) for w, n in zip(wanted, sizes, strict=True)]
    step = 1 if sum(counts) < total else -1
    while sum(counts) != total:
        open_to = [i for i in range(len(counts)) if (counts[i] < sizes[i] if step > 0 else counts[i] > 0)]
        open_to.sort(key=lambda i: step * (wanted[i] - counts[i]), reverse=True)
        for i in open_to[: abs(total - sum(counts))]:
            counts[i] += step
    return counts
