"""What a sparse encoder makes of texts: weights of words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SparseVectors:
    """Weighted words of some texts, one text behind the other; those of a text ascend by number.

    Attributes:
        indices: [entries] int32 numbers of words.
        values: [entries] float32, above zero.
        in_text: [entries] whether the text itself has the word, or was only taken to mean it.
        counts: [texts] entries of each text.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    in_text: NDArray[np.bool_]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = {len(self.indices), len(self.values), len(self.in_text), int(self.counts.sum())}
        if len(sizes) > 1:
            raise ValueError(f"{len(self.indices)} ids, {len(self.values)} weights, {int(self.counts.sum())} counted")

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, text: int) -> "SparseVectors":
        """Those of one text."""
        end = int(self.counts[: text + 1].sum())
        part = slice(end - int(self.counts[text]), end)
        return SparseVectors(self.indices[part], self.values[part], self.in_text[part], self.counts[text : text + 1])

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """[entries] which text each entry belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def from_dicts(cls, rows: Sequence[dict[int, float]], own: bool = True) -> "SparseVectors":
        """From a mapping of words to weights for each text."""
        entries = [(i, w) for row in rows for i, w in sorted(row.items())]
        return cls(
            np.array([i for i, _ in entries], np.int32),
            np.array([w for _, w in entries], np.float32),
            np.full(len(entries), own),
            np.array([len(row) for row in rows], np.int64),
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[SparseVectors]") -> "SparseVectors":
        """Some behind each other."""
        if not parts:
            return cls.from_dicts([])
        return cls(
            np.concatenate([p.indices for p in parts]),
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.in_text for p in parts]),
            np.concatenate([p.counts for p in parts]),
        )

    def take(self, texts: Sequence[int]) -> "SparseVectors":
        """Those of some texts."""
        ends = np.cumsum(self.counts)
        spans = [np.arange(ends[t] - self.counts[t], ends[t]) for t in texts]
        rows = np.concatenate([*spans, np.empty(0, np.int64)]).astype(np.int64)
        return SparseVectors(
            self.indices[rows], self.values[rows], self.in_text[rows], self.counts[np.asarray(texts, np.int64)]
        )

    def dot(self, query: "SparseVectors") -> NDArray[np.float32]:
        """Inner products of all texts with one other, [texts]."""
        if not len(query.indices):
            return np.zeros(len(self), np.float32)
        at = np.minimum(np.searchsorted(query.indices, self.indices), len(query.indices) - 1)
        each = np.where(query.indices[at] == self.indices, self.values * query.values[at], 0)
        return np.bincount(self.text_ids, each, len(self)).astype(np.float32)

    def bag_of_words(self) -> "SparseVectors":
        """The texts' own words alone, each with weight one."""
        counts = np.bincount(self.text_ids[self.in_text], minlength=len(self))
        ids = self.indices[self.in_text]
        return SparseVectors(ids, np.ones(len(ids), np.float32), np.ones(len(ids), np.bool_), counts)
