"""How many tokens each part keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contracts import ImageLayout, PrunePlan

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 0.01  # share
COLDEST = 1e-6  # temperature: divided by less, scores overflow


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that nothing can be divided by.

    Raises:
        ValueError: it is out of range.
    """
    if not COLDEST <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of {COLDEST} or more, got {temperature}")


def check_retain(retain: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: it is out of range.
    """
    if not LEAST <= retain <= 1:
        raise ValueError(f"retain: expected a share from {LEAST} to 1, got {retain}")


def plan(layout: ImageLayout, retain: float) -> PrunePlan:
    """The same share of each view before the grid, of which one token stays at least, and of the grid; all newlines."""
    parts = {
        "thumbnail": layout.frames * max(1, int(layout.side * layout.side * retain)),
        "crops": int(layout.cells * retain),
        "newlines": layout.newlines,
    }
    return PrunePlan(sum(parts.values()), parts)


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` highest of [n] scores, the highest first; of equal ones the earlier."""
    return scores.sort(descending=True, stable=True).indices[:count]


def allocate(sizes: Sequence[int], wanted: Sequence[float], total: int) -> list[int]:
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
