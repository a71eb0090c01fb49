"""The arrays of `adjacency`, without its compiled code.

They are in a module without numba, since numba imported before vLLM 0.32 starts breaks vLLM's CPU engine.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NONE = -1
BIN_EDGES = np.array([0.9, 0.7, 0.5, 0.3, 0.15, 0.07, 0.02], np.float32)  # lower edges of bins 0 .. 6; bin 7 is below
FROM_TEXT = len(BIN_EDGES) + 1
NUM_CONFIDENCES = FROM_TEXT + 1
MAX_SEEN = 2000.0  # observations of a candidate at which its counts are halved, so that recent ones weigh more


class AdjacencyTable(NamedTuple):
    """The adjacency matrix, with hashed rows for longer contexts.

    Attributes:
        tokens: [vocab + 2**bits, k] candidate tokens of each row, most probable first; `NONE` for a missing candidate.
        confidence: [vocab + 2**bits, k] confidence bin of each candidate.
        keys: [2**bits] hashes of the contexts that own the hashed rows; 0 for an empty row.
    """

    tokens: NDArray[np.int32]
    confidence: NDArray[np.uint8]
    keys: NDArray[np.uint64]


class AcceptanceRates(NamedTuple):
    """The acceptance rates of candidates, each [order + 1, k, NUM_CONFIDENCES]; order 0 is not used.

    Attributes:
        seen: Number of tokens that followed a context with a candidate of this order, rank and confidence.
        right: Number of those tokens that were the candidate.
        rate: Ratio of both.
    """

    seen: NDArray[np.float32]
    right: NDArray[np.float32]
    rate: NDArray[np.float32]


def make_adjacency_table(vocab_size: int, k: int, order: int, bits: int) -> AdjacencyTable:
    """Return an empty table.

    Args:
        vocab_size: Size of the vocabulary.
        k: Number of candidates in a row.
        order: Longest context with its own rows, in tokens; with 1 there is only the paper's matrix.
        bits: Logarithm of the number of hashed rows.
    """
    hashed = 1 << bits if order > 1 else 0
    return AdjacencyTable(
        np.full((vocab_size + hashed, k), NONE, np.int32),
        np.zeros((vocab_size + hashed, k), np.uint8),
        np.zeros(hashed, np.uint64),
    )


def make_acceptance_rates(order: int, k: int) -> AcceptanceRates:
    """Return initial acceptance rates, a prior with the weight of four observations.

    Candidates of higher probability have a higher rate; later ranks and contexts of one token have a lower rate.
    """
    by_confidence = np.array([0.85, 0.65, 0.5, 0.35, 0.2, 0.1, 0.04, 0.01, 0.5], np.float32)
    by_rank = 1 / np.arange(1, k + 1, dtype=np.float32)
    rate = np.multiply(by_confidence, by_rank[None, :, None], dtype=np.float32) * np.ones((order + 1, 1, 1), np.float32)
    rate[:2] *= 0.6
    seen = np.full_like(rate, 4.0)
    return AcceptanceRates(seen, np.multiply(rate, seen, dtype=np.float32), rate)
