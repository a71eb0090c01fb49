"""How near a passage has to come to a question: calibrated by `rag eval`, kept beside the index."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from pilotfish._internal import atomic_write

from ...retrieval.errors import RetrievalError

NAME = "rag.json"
WRONG = 0.1  # of questions that can be answered: more may not be refused, or nobody would ask again
MIN_QUESTIONS = 5  # questions of each kind that a threshold is kept for


def read_threshold(folder: Path) -> float:
    """The threshold of an index; 0 where none was calibrated.

    Raises:
        RetrievalError: the file is none of ours.
    """
    try:
        found = float(json.loads((folder / NAME).read_text(encoding="utf-8"))["threshold"])
        if not math.isfinite(found):
            raise ValueError
        return found
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise RetrievalError(
            f"{folder / NAME}: cannot be read; calibrate again with `pilotfish rag eval --save`"
        ) from None


def write_threshold(folder: Path, threshold: float, told: dict[str, float]) -> None:
    """Keep a threshold, with what it was found by.

    Raises:
        OSError: it cannot be written.
    """
    atomic_write.write_bytes(folder / NAME, json.dumps({"threshold": round(threshold, 4), **told}, indent=1).encode())


def calibrate_threshold(answerable: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """The threshold that tells best, and how well: the mean share of both kinds on their right side of it.

    At most a tenth of the questions that can be answered fall below it. None where one kind is missing.

    Args:
        answerable: Similarities of the best passages of questions that the documents answer.
        others: Of questions that they do not.
    """
    if not answerable or not others:
        return None
    both = sorted({*answerable, *others})
    candidates = [min([0.0, *both]), *((a + b) / 2 for a, b in itertools.pairwise(both))]

    def kept(threshold: float) -> float:
        return sum(s >= threshold for s in answerable) / len(answerable)

    def balance(threshold: float) -> float:
        return (kept(threshold) + sum(s < threshold for s in others) / len(others)) / 2

    best = max((t for t in candidates if kept(t) >= 1 - WRONG), key=balance)
    return best, balance(best)
