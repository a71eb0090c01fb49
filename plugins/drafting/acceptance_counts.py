"""Counts of the retrieved tokens that were accepted, without the compiled code of `tries`.

They are in a module without numba, since numba imported before vLLM 0.32 starts breaks vLLM's CPU engine.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

LENGTHS = np.array([2, 3, 4, 5, 7, 9, 13, 17, 25, 33], np.int32)  # upper edges of the bins of matching tokens
SHARES = np.array([0.95, 0.65, 0.45, 0.25, 0.1], np.float32)  # lower edges of the bins of shares
CONDITIONALS = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.85, 0.93], np.float32)  # upper edges
FIRST, LISTED, ABSENT, UNKNOWN = range(4)  # in the base drafter's tree: best child, child, no child, no such parent
ANY = 4  # index of the counts over all base feedback
SHARED = -1  # in place of feedback: a node of the base tree that is also in the retrieved one, and counted there
SHAPE = (len(LENGTHS) + 1, len(SHARES) + 1, 5)
BASE = -1  # index of the counts of the base drafter's tree, the last one
MAX_COUNT = 1000  # observations at which the counts of a cell are halved
FEEDBACK_PRIOR = np.float32(8.0)  # weight of the rate over all base feedback in the rate of one kind


def make_acceptance_counts(sources: int) -> tuple[Float32, Float32]:
    """Return a weak prior of the counts of verified and accepted nodes.

    Args:
        sources: Number of sources of continuations.

    Returns:
        Counts of verified and of accepted nodes, each [sources + 1, lengths, shares, feedback + 1]. The last entry of
        the first axis belongs to the base drafter's tree, with bins of its conditional scores instead of lengths, and
        of the probability of its retrieved siblings. The last entry of the last axis is for all feedback.
    """
    by_length = np.array([0.3, 0.35, 0.45, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.95], np.float32)
    by_share = np.array([1.0, 0.75, 0.5, 0.35, 0.2, 0.08], np.float32)
    retrieved = by_length[:, None] * by_share
    by_conditional = np.array([0.01, 0.03, 0.07, 0.15, 0.25, 0.38, 0.52, 0.68, 0.8, 0.9, 0.95], np.float32)
    left = np.array([0.05, 0.2, 0.45, 0.65, 0.8, 1.0], np.float32)  # by retrieved tokens at the bounds of `SHARES`
    rate = np.stack([*[retrieved] * sources, np.minimum(by_conditional[:, None], left)])
    num_verified, num_accepted = np.zeros((2, sources + 1, *SHAPE), np.float32)
    num_verified[..., ANY], num_accepted[..., ANY] = 4.0, 4.0 * rate
    return num_verified, num_accepted
