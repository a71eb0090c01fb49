"""An encoder without a model: hashed counts of character trigrams, for indexes of the type ``dense``.

Texts match by spelling, so that a query with a typing error still finds its documents.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from pilotfish import Encoder, NoOptions, TokenEmbeddings, hookimpl


class CharTrigrams(Encoder):
    """Unit vectors of hashed character trigram counts, with square roots of the counts."""

    name: ClassVar[str] = "char_trigrams"
    dimension = 1024

    def __init__(self, options: NoOptions, device: str = "auto", precision: str = "float32") -> None:
        del options, device, precision  # no model

    @property
    def fingerprint(self) -> str:
        """Version of the encoding; change it whenever the vectors change."""
        return f"char-trigrams-1-{self.dimension}"

    def encode_documents(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> TokenEmbeddings:
        """Encode documents; an index of the type ``dense`` reads ``pooled``."""
        pooled = np.array([self._vector(text) for text in texts], np.float32).reshape(-1, self.dimension)
        if progress is not None:
            progress(len(texts))
        no_tokens = np.empty((0, self.dimension), np.float32)
        return TokenEmbeddings(no_tokens, np.empty(0, np.int32), np.zeros(len(texts), np.int64), pooled)

    def encode_queries(self, texts: Sequence[str]) -> TokenEmbeddings:
        """Encode queries like documents."""
        return self.encode_documents(texts)

    def _vector(self, text: str) -> np.ndarray:
        padded = f"  {' '.join(text.lower().split())}  "
        buckets = [zlib.crc32(padded[i : i + 3].encode()) % self.dimension for i in range(len(padded) - 2)]
        weights = np.sqrt(np.bincount(buckets, minlength=self.dimension))
        return weights / np.linalg.norm(weights)


@hookimpl
def register_encoders(register) -> None:
    """Register the encoder."""
    register(CharTrigrams)
