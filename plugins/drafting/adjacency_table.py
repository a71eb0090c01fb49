"""The arrays of `adjacency` without its compiled code: numba imported before vLLM 0.32 starts breaks its CPU engine."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NONE = -1
BIN_EDGES = np.array([0.9, 0.7, 0.5, 0.3, 0.15, 0.07, 0.02], np.float32)  # lower edges of bins 0 .. 6; bin 7 is below
FROM_TEXT = len(BIN_EDGES) + 1
NUM_CONFIDENCES = FROM_TEXT + 1


class AdjacencyTable(NamedTuple):
    """All rows. ``tokens``, ``confidence``: [vocab + 2**bits, k]; ``keys`` [2**bits] names the hashed contexts."""

    tokens: NDArray[np.int32]
    confidence: NDArray[np.uint8]
    keys: NDArray[np.uint64]


class AcceptanceRates(NamedTuple):
    """Counts of candidates seen and found right, and their ratio; each [order + 1, k, CONFIDENCES], index 0 unused."""

    seen: NDArray[np.float32]
    right: NDArray[np.float32]
    rate: NDArray[np.float32]


def make_adjacency_table(vocab_size: int, k: int, order: int, bits: int) -> AdjacencyTable:
    """Empty rows; with ``order`` 1 only the paper's matrix."""
    hashed = 1 << bits if order > 1 else 0
    return AdjacencyTable(
        np.full((vocab_size + hashed, k), NONE, np.int32),
        np.zeros((vocab_size + hashed, k), np.uint8),
        np.zeros(hashed, np.uint64),
    )


def make_acceptance_rates(order: int, k: int) -> AcceptanceRates:
    """A weak prior (four sightings): likelier candidates are right more often, later ranks and order 1 less often."""
    by_confidence = np.array([0.85, 0.65, 0.5, 0.35, 0.2, 0.1, 0.04, 0.01, 0.5], np.float32)
    by_rank = 1 / np.arange(1, k + 1, dtype=np.float32)
    rate = np.multiply(by_confidence, by_rank[None, :, None], dtype=np.float32) * np.ones((order + 1, 1, 1), np.float32)
    rate[:2] *= 0.6
    seen = np.full_like(rate, 4.0)
    return AcceptanceRates(seen, np.multiply(rate, seen, dtype=np.float32), rate)
