"""How many tokens each part keeps."""

from collections.abc import Sequence

LEAST = 0.01  # share below which a small picture would keep nothing


def check_retain(retain: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: it is out of range.
    """
    if not LEAST <= retain <= 1:
        raise ValueError(f"retain: expected a share from {LEAST} to 1, got {retain}")


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
