"""What a multi-vector encoder makes of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenEmbeddings:
    """Vectors of the tokens of some texts, one text behind the other.

    Attributes:
        vectors: [tokens, dimension] float32 or float16, of length one.
        token_ids: [tokens] the vocabulary's numbers.
        counts: [texts] tokens of each text.
        pooled: [texts, width] one vector for each text, of length one, where the encoder makes such.
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

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, text: int) -> "TokenEmbeddings":
        """Those of one text."""
        end = int(self.counts[: text + 1].sum())
        part = slice(end - int(self.counts[text]), end)
        pooled = None if self.pooled is None else self.pooled[text : text + 1]
        return TokenEmbeddings(self.vectors[part], self.token_ids[part], self.counts[text : text + 1], pooled)

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """[tokens] which text each token belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def concatenate(cls, parts: "Sequence[TokenEmbeddings]") -> "TokenEmbeddings":
        """Some behind each other."""
        return cls(
            np.concatenate([p.vectors for p in parts]),
            np.concatenate([p.token_ids for p in parts]),
            np.concatenate([p.counts for p in parts]),
            np.concatenate(pooled) if (pooled := [p.pooled for p in parts if p.pooled is not None]) else None,
        )
