"""Sparse vectors of texts: term weights, in a layout like CSR."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import NOT_FINITE, RetrievalError


@dataclass(frozen=True)
class SparseVectors:
    """Term weights of texts, concatenated; the entries of a text are in term id order.

    Attributes:
        indices: [entries] int32 term ids.
        values: [entries] float32 weights, greater than zero.
        in_text: [entries] bool, whether the text contains the term; False for expansion terms.
        counts: [texts] int64 number of entries of each text.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    in_text: NDArray[np.bool_]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = {len(self.indices), len(self.values), len(self.in_text), int(self.counts.sum())}
        if len(sizes) > 1:
            raise ValueError(f"{len(self.indices)} ids, {len(self.values)} weights, {int(self.counts.sum())} counted")
        if not np.isfinite(self.values).all():
            raise RetrievalError(NOT_FINITE)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, text: int) -> "SparseVectors":
        """Return the vector of one text."""
        end = int(self.counts[: text + 1].sum())
        part = slice(end - int(self.counts[text]), end)
        return SparseVectors(self.indices[part], self.values[part], self.in_text[part], self.counts[text : text + 1])

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """Index of the text of each entry, [entries]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def from_dicts(cls, rows: Sequence[dict[int, float]], own: bool = True) -> "SparseVectors":
        """Build vectors from one mapping of term ids to weights per text."""
        entries = [(i, w) for row in rows for i, w in sorted(row.items())]
        return cls(
            np.array([i for i, _ in entries], np.int32),
            np.array([w for _, w in entries], np.float32),
            np.full(len(entries), own),
            np.array([len(row) for row in rows], np.int64),
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[SparseVectors]") -> "SparseVectors":
        """Concatenate batches of vectors."""
        if not parts:
            return cls.from_dicts([])
        return cls(
            np.concatenate([p.indices for p in parts]),
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.in_text for p in parts]),
            np.concatenate([p.counts for p in parts]),
        )

    def take(self, texts: Sequence[int]) -> "SparseVectors":
        """Return the vectors of some texts, in the given order."""
        ends = np.cumsum(self.counts)
        spans = [np.arange(ends[t] - self.counts[t], ends[t]) for t in texts]
        rows = np.concatenate([*spans, np.empty(0, np.int64)]).astype(np.int64)
        return SparseVectors(
            self.indices[rows], self.values[rows], self.in_text[rows], self.counts[np.asarray(texts, np.int64)]
        )

    def dot(self, query: "SparseVectors") -> NDArray[np.float32]:
        """Compute the inner product of each text with one query, [texts] float32."""
        if not len(query.indices):
            return np.zeros(len(self), np.float32)
        at = np.minimum(np.searchsorted(query.indices, self.indices), len(query.indices) - 1)
        each = np.where(query.indices[at] == self.indices, self.values * query.values[at], 0)
        return np.bincount(self.text_ids, each, len(self)).astype(np.float32)

    def bag_of_words(self) -> "SparseVectors":
        """Return the bag of words of each text: the terms that it contains, each with weight 1."""
        counts = np.bincount(self.text_ids[self.in_text], minlength=len(self))
        ids = self.indices[self.in_text]
        return SparseVectors(ids, np.ones(len(ids), np.float32), np.ones(len(ids), np.bool_), counts)
