"""Tests that vectors with NaN or infinity are refused when an encoder returns them."""

import numpy as np
import pytest

from pilotfish.retrieval import RetrievalError
from pilotfish.retrieval.sparse_vectors import SparseVectors
from pilotfish.retrieval.token_embeddings import TokenEmbeddings

BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", ["vectors", "pooled"])
def test_token_vectors_are_finite(bad: float, place: str) -> None:
    arrays = {"vectors": np.ones((2, 4), np.float16), "pooled": np.ones((1, 4), np.float32)}
    TokenEmbeddings(token_ids=np.zeros(2, np.int32), counts=np.array([2]), **arrays)
    arrays[place][0, 1] = bad
    with pytest.raises(RetrievalError, match="NaN or infinite"):
        TokenEmbeddings(token_ids=np.zeros(2, np.int32), counts=np.array([2]), **arrays)


@pytest.mark.parametrize("bad", BAD)
def test_term_weights_are_finite(bad: float) -> None:
    with pytest.raises(RetrievalError, match="NaN or infinite"):
        SparseVectors.from_dicts([{1: 1.0, 2: bad}])
