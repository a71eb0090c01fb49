"""Tests of collections with encoded documents."""

from typing import Any

import numpy as np
import pytest

from pilotfish.integrations.bench.corpus import Corpus, union_of_collections
from pilotfish.retrieval.sparse_vectors import SparseVectors
from pilotfish.retrieval.token_embeddings import TokenEmbeddings


class SparseEncoder:
    """Encodes a text as its length."""

    def encode_documents(self, texts: list[str]) -> SparseVectors:
        return SparseVectors.from_dicts([{7: float(len(t))} for t in texts])


class TokenEncoder:
    """Encodes a text as one embedding per character."""

    def encode_documents(self, texts: list[str]) -> TokenEmbeddings:
        return embeddings([len(t) for t in texts])


def embeddings(lengths: list[int]) -> TokenEmbeddings:
    n = sum(lengths)
    return TokenEmbeddings(np.ones((n, 4), np.float32), np.zeros(n, np.int32), np.array(lengths, np.int64))


def collection(name: str, texts: list[str]) -> Corpus:
    ids = [str(i) for i in range(len(texts))]
    tokens = embeddings([len(t) for t in texts])
    return Corpus(name, ids, texts, ["q"], ["query"], {"q": {"0": 1}}, tokens, [embeddings([2])], {"encode_s": 1.0}, "")


@pytest.mark.parametrize("encoder", [SparseEncoder(), TokenEncoder()])
def test_a_union_holds_the_encoded_documents_of_its_parts(encoder: Any) -> None:
    parts = [collection("a", ["one", "three"]), collection("b", ["seven"])]
    union = union_of_collections(parts)
    encoded, expected = union.by(encoder), encoder.encode_documents(union.texts)
    assert type(encoded) is type(expected)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(encoded, name), value)
    assert union.by(encoder) is encoded, "encoded once"
    assert union.ids == ["a:0", "a:1", "b:0"]
