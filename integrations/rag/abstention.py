"""The abstention threshold: the smallest similarity of the best passage. `rag eval` calibrates it for an index."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from pilotfish._internal import atomic_write

from ...retrieval.errors import RetrievalError

NAME = "rag.json"
WRONG = 0.1  # largest share of false abstentions among answerable questions
MIN_QUESTIONS = 5  # smallest number of answerable and of unanswerable questions for which a threshold is saved


def read_threshold(folder: Path) -> float:
    """Read the threshold of an index; 0 if none was calibrated.

    Raises:
        RetrievalError: The file cannot be read, or contains no threshold.
    """
    try:
        threshold = float(json.loads((folder / NAME).read_text(encoding="utf-8"))["threshold"])
        if not math.isfinite(threshold):
            raise ValueError
        return threshold
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise RetrievalError(
            f"{folder / NAME}: cannot be read; calibrate again with `pilotfish rag eval --save`"
        ) from None


def write_threshold(folder: Path, threshold: float, details: dict[str, float]) -> None:
    """Write the threshold of an index atomically.

    Args:
        folder: Folder of the index.
        threshold: Threshold.
        details: Further values that describe the calibration.

    Raises:
        OSError: The file cannot be written.
    """
    atomic_write.write_bytes(
        folder / NAME, json.dumps({"threshold": round(threshold, 4), **details}, indent=1).encode()
    )


def calibrate_threshold(answerable: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """Calibrate the threshold that best separates answerable and unanswerable questions.

    At most a tenth of the answerable questions are below the threshold.

    Args:
        answerable: Similarities of the best passage of each answerable question.
        others: The same of unanswerable questions.

    Returns:
        The threshold and its balanced accuracy: the mean of the shares of both on the correct side. None if there are
        no questions of one of the two.
    """
    if not answerable or not others:
        return None
    both = sorted({*answerable, *others})
    candidates = [min([0.0, *both]), *((a + b) / 2 for a, b in itertools.pairwise(both))]

    def share_above(threshold: float) -> float:
        return sum(s >= threshold for s in answerable) / len(answerable)

    def balance(threshold: float) -> float:
        return (share_above(threshold) + sum(s < threshold for s in others) / len(others)) / 2

    best = max((t for t in candidates if share_above(t) >= 1 - WRONG), key=balance)
    return best, balance(best)
