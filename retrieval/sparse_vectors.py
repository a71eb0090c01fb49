"""What a sparse encoder makes of texts: weights of words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Words:
    """Weighted words of some texts, one text behind the other; those of a text ascend by number.

    Attributes:
        ids: [entries] int32 numbers of words.
        weights: [entries] float32, above zero.
        own: [entries] whether the text itself has the word, or was only taken to mean it.
        counts: [texts] entries of each text.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    own: NDArray[np.bool_]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = {len(self.ids), len(self.weights), len(self.own), int(self.counts.sum())}
        if len(sizes) > 1:
            raise ValueError(f"{len(self.ids)} ids, {len(self.weights)} weights, {int(self.counts.sum())} counted")

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, text: int) -> "Words":
        """Those of one text."""
        end = int(self.counts[: text + 1].sum())
        part = slice(end - int(self.counts[text]), end)
        return Words(self.ids[part], self.weights[part], self.own[part], self.counts[text : text + 1])

    @property
    def texts(self) -> NDArray[np.int64]:
        """[entries] which text each entry belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def of(cls, rows: Sequence[dict[int, float]], own: bool = True) -> "Words":
        """From a mapping of words to weights for each text."""
        entries = [(i, w) for row in rows for i, w in sorted(row.items())]
        return cls(
            np.array([i for i, _ in entries], np.int32),
            np.array([w for _, w in entries], np.float32),
            np.full(len(entries), own),
            np.array([len(row) for row in rows], np.int64),
        )

    @classmethod
    def join(cls, parts: "Sequence[Words]") -> "Words":
        """Some behind each other."""
        if not parts:
            return cls.of([])
        return cls(
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.weights for p in parts]),
            np.concatenate([p.own for p in parts]),
            np.concatenate([p.counts for p in parts]),
        )

    def take(self, texts: Sequence[int]) -> "Words":
        """Those of some texts."""
        ends = np.cumsum(self.counts)
        spans = [np.arange(ends[t] - self.counts[t], ends[t]) for t in texts]
        rows = np.concatenate([*spans, np.empty(0, np.int64)]).astype(np.int64)
        return Words(self.ids[rows], self.weights[rows], self.own[rows], self.counts[np.asarray(texts, np.int64)])

    def products(self, query: "Words") -> NDArray[np.float32]:
        """Inner products of all texts with one other, [texts]."""
        if not len(query.ids):
            return np.zeros(len(self), np.float32)
        at = np.minimum(np.searchsorted(query.ids, self.ids), len(query.ids) - 1)
        each = np.where(query.ids[at] == self.ids, self.weights * query.weights[at], 0)
        return np.bincount(self.texts, each, len(self)).astype(np.float32)

    def bag(self) -> "Words":
        """The texts' own words alone, each with weight one."""
        counts = np.bincount(self.texts[self.own], minlength=len(self))
        ids = self.ids[self.own]
        return Words(ids, np.ones(len(ids), np.float32), np.ones(len(ids), np.bool_), counts)
