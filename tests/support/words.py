"""Fast deterministic encoders for tests: the vector or the weight of a word is derived from a hash of its letters."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from pilotfish.plugins.contracts import Encoder
from pilotfish.plugins.hookspecs import Register, hookimpl
from pilotfish.plugins.manager import plugins
from pilotfish.retrieval.sparse_vectors import SparseVectors as Weighted
from pilotfish.retrieval.token_embeddings import TokenEmbeddings

DIMENSION = 24


def vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    values = np.random.default_rng(seed).normal(size=DIMENSION)
    return (values / np.linalg.norm(values)).astype(np.float32)


class Words(Encoder):
    """Multi-vector encoder with one vector per word."""

    name: ClassVar[str] = "words"
    dimension = DIMENSION

    def __init__(self, options: Any = None, device: str = "auto", precision: str = "float32") -> None:
        del options, device, precision

    @property
    def fingerprint(self) -> str:
        return "words-1"

    def encode_queries(self, texts: Sequence[str]) -> TokenEmbeddings:
        return self.encode_documents(texts)

    def encode_documents(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> TokenEmbeddings:
        rows = [self.words(t) for t in texts]
        if progress is not None:
            progress(len(texts))
        every = [w for row in rows for w in row]
        vectors = np.stack([vector(w) for w in every]) if every else np.empty((0, DIMENSION), np.float32)
        ids = np.array([int.from_bytes(hashlib.sha256(w.encode()).digest()[:2], "big") for w in every], np.int32)
        return TokenEmbeddings(vectors, ids, np.array([len(r) for r in rows], np.int64))

    def words(self, text: str, query: bool = False) -> list[str]:
        del query
        return ["[start]", *text.lower().split()]

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        del overlap
        words = text.split()
        return [" ".join(words[i : i + size]) for i in range(0, max(len(words), 1), size)]


def weights(text: str) -> dict[int, float]:
    """Return term weights: each word gets a weight, and its reverse spelling a small weight, like an expansion term."""
    found: dict[int, float] = {}
    for word in ["[start]", *text.lower().split()]:
        digest = hashlib.sha256(word.encode()).digest()
        meant = int.from_bytes(hashlib.sha256(word[::-1].encode()).digest()[:3], "big")
        found[meant] = max(found.get(meant, 0.0), 0.25)
        own = int.from_bytes(digest[:3], "big")
        found[own] = max(found.get(own, 0.0), 0.5 + digest[3] / 256)
    return found


class Weights(Encoder):
    """Sparse encoder with one weight per word."""

    name: ClassVar[str] = "word-weights"
    dimension = 1 << 24

    def __init__(self, options: Any = None, device: str = "auto", precision: str = "float32") -> None:
        del options, device, precision

    @property
    def fingerprint(self) -> str:
        return "word-weights-1"

    def encode_queries(self, texts: Sequence[str]) -> Weighted:
        return self.encode_documents(texts)

    def encode_documents(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Weighted:
        if progress is not None:
            progress(len(texts))
        return Weighted.from_dicts([weights(t) for t in texts])

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        return Words().chunks(text, size, overlap)


# For each index type, its test encoder and the options that give exact scores.
HYBRID = "xtr=words,vdr=word-weights,dense=words"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "xtr": ("words", {"dimension": 0}),
    "vdr": ("word-weights", {}),
    "bm25": ("stems", {}),
    "dense": ("words", {}),
    "hybrid": (HYBRID, {"members": "xtr+vdr+bm25+dense", "options": {"xtr": {"dimension": 0}}}),
}


class _Plugin:
    @hookimpl
    def register_encoders(self, register: Register) -> None:
        register(Words)
        register(Weights)


def use() -> None:
    """Register the encoders, once per process."""
    if "words" not in plugins().classes("encoder"):
        plugins().register(_Plugin(), "test-words")
