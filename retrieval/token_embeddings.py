"""Multi-vector embeddings of texts: one vector per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import NOT_FINITE, RetrievalError


@dataclass(frozen=True)
class TokenEmbeddings:
    """Token vectors of texts, concatenated.

    Attributes:
        vectors: [tokens, dimension] float32 or float16 vectors of unit length.
        token_ids: [tokens] int32 token ids of the vocabulary.
        counts: [texts] int64 number of tokens of each text.
        pooled: [texts, width] float32 vectors of unit length of whole texts; None if the encoder computes none.
    """

    vectors: NDArray
    token_ids: NDArray[np.int32]
    counts: NDArray[np.int64]
    pooled: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.token_ids) or int(self.counts.sum()) != len(self.token_ids):
            raise ValueError(
                f"{len(self.vectors)} vectors, {len(self.token_ids)} ids, {int(self.counts.sum())} counted"
            )
        if not all(np.isfinite(v).all() for v in (self.vectors, self.pooled) if v is not None):
            raise RetrievalError(NOT_FINITE)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, text: int) -> "TokenEmbeddings":
        """Return the embeddings of one text."""
        end = int(self.counts[: text + 1].sum())
        part = slice(end - int(self.counts[text]), end)
        pooled = None if self.pooled is None else self.pooled[text : text + 1]
        return TokenEmbeddings(self.vectors[part], self.token_ids[part], self.counts[text : text + 1], pooled)

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """Index of the text of each token, [tokens]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def concatenate(cls, parts: "Sequence[TokenEmbeddings]") -> "TokenEmbeddings":
        """Concatenate batches of embeddings."""
        return cls(
            np.concatenate([p.vectors for p in parts]),
            np.concatenate([p.token_ids for p in parts]),
            np.concatenate([p.counts for p in parts]),
            np.concatenate(pooled) if (pooled := [p.pooled for p in parts if p.pooled is not None]) else None,
        )
