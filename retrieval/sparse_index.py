"""Arrays of a sparse index: inverted lists in blocks, and an exact search that skips blocks (Block-Max, SIGIR 2011).

    shared    step [1] float32: quantisation step, a weight is impact * step
    segment   documents [n] internal doc ids, ascending
              terms [t] term ids, ascending; term_starts [t + 1] first block of each term
              blocks [b] doc id // 16, tops [b] largest impact of the block, sizes [b] number of its postings
              skips [b // 64 + 1] first posting of every 64th block
              places [p] doc id % 16, impacts [p] quantised weights, 1 or more

If a segment has few documents and the query few postings in it, all documents are scored. Otherwise a search sums the
largest impacts of each block over the query terms, an upper bound of the scores of its documents. It scores the blocks
with the highest bounds, in growing numbers, for a lower bound of the k-th best score, and finally all blocks whose
upper bound reaches it. The result equals that of exhaustive scoring.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .kernels import sparse_search
from .ranking import is_allowed, top_documents
from .sparse_vectors import SparseVectors

Arrays = Mapping[str, NDArray]
ROOM = 1.25  # headroom: later documents may have larger weights than the first ones
FIRST, MORE = 16, 8  # blocks scored first, in addition to k; factor by which the number grows
EXHAUSTIVE = 1 << 19  # postings of the query + documents of the segment, up to which exhaustive scoring is faster
NO_FILTER = np.empty(0, np.uint8)


def train_impacts(weights: NDArray[np.float32], bits: int) -> dict[str, NDArray]:
    """Compute the quantisation step from the weights of the first documents."""
    levels = (1 << bits) - 1
    return {"step": np.array([ROOM * float(weights.max(initial=1e-6)) / levels], np.float32)}


def build_sparse_segment(
    words: SparseVectors, numbers: NDArray[np.int64], shared: Arrays, bits: int
) -> dict[str, NDArray]:
    """Build the inverted lists of documents.

    Args:
        words: Term weights of the documents.
        numbers: [documents] internal doc ids, ascending.
        shared: Shared arrays; see `train_impacts`.
        bits: Bits of an impact: 8 or 16.
    """
    dtype = np.uint8 if bits == 8 else np.uint16
    impacts = np.clip(np.rint(words.values / shared["step"][0]), 0, np.iinfo(dtype).max).astype(dtype)
    documents = np.repeat(numbers.astype(np.int32), words.counts)
    nonzero = impacts > 0
    return _lists(words.indices[nonzero], documents[nonzero], impacts[nonzero], numbers.astype(np.int32))


def merge_sparse_segments(segments: Sequence[Arrays], live: NDArray[np.bool_]) -> dict[str, NDArray]:
    """Merge segments into one, without the documents that are not ``live``."""
    parts = []
    for s in segments:
        documents = np.repeat(s["blocks"], s["sizes"]) * sparse_search.BLOCK + s["places"]
        per_term = np.diff(np.concatenate([[0], np.cumsum(s["sizes"], dtype=np.int64)])[s["term_starts"]])
        mask = live[documents]
        parts.append((np.repeat(s["terms"], per_term)[mask], documents[mask], s["impacts"][mask]))
    terms, documents, impacts = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(documents, kind="stable")
    numbers = np.sort(np.concatenate([s["documents"][live[s["documents"]]] for s in segments]))
    return _lists(terms[order], documents[order], impacts[order], numbers)


def _lists(terms: NDArray, documents: NDArray, impacts: NDArray, numbers: NDArray[np.int32]) -> dict[str, NDArray]:
    """Build the arrays of a segment from postings in document order."""
    present, terms = np.unique(terms, return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=len(present)))]).astype(np.int64)
    order = sparse_search.by_term(terms, starts.copy())
    documents, impacts = documents[order], impacts[order]
    term_starts, blocks, tops, sizes, skips = sparse_search.blocks_of(starts, documents, impacts)
    return {
        "documents": numbers,
        "terms": present.astype(np.int32),
        "term_starts": term_starts,
        "blocks": blocks,
        "tops": tops,
        "sizes": sizes,
        "skips": skips,
        "places": (documents % sparse_search.BLOCK).astype(np.uint8),
        "impacts": impacts,
    }


class SegmentSearcher:
    """Searcher of one segment."""

    def __init__(self, arrays: Arrays, documents: int) -> None:
        """Wrap and check the arrays of a segment.

        Raises:
            ValueError: The arrays do not fit each other, or a doc id is not below ``documents``.
        """
        self.terms, self.term_starts = arrays["terms"], arrays["term_starts"]
        self.blocks, self.tops, self.sizes = arrays["blocks"], arrays["tops"], arrays["sizes"]
        self.skips, self.places, self.impacts = arrays["skips"], arrays["places"], arrays["impacts"]
        blocks, block, skip = len(self.blocks), sparse_search.BLOCK, sparse_search.SKIP
        if (blocks, blocks, blocks // skip + 1) != (len(self.tops), len(self.sizes), len(self.skips)):
            raise ValueError(f"{blocks} blocks, {len(self.tops)} tops, {len(self.sizes)} sizes")
        if self.term_starts[0] != 0 or self.term_starts[-1] != blocks or (np.diff(self.term_starts) < 0).any():
            raise ValueError("lists that do not follow each other")
        starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        self.term_postings = starts[self.term_starts]
        if len(self.terms) + 1 != len(self.term_starts) or {len(self.places), len(self.impacts)} != {int(starts[-1])}:
            raise ValueError("lists of different lengths")
        if (np.diff(self.terms) <= 0).any() or (starts[:-1:skip] != self.skips[: -(-blocks // skip)]).any():
            raise ValueError("terms out of order")
        self.first, last = int(self.blocks.min()), int(self.blocks.max())
        self.count = last + 1 - self.first
        highest = int(self.places[starts[1:][self.blocks == last] - 1].max())  # places are ascending within a block
        if self.first < 0 or last * block + highest >= documents or int(self.places.max()) >= block:
            raise ValueError(f"numbers of documents beyond {documents}")

    def at(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the positions of term ids among the terms of the segment, and a mask of those that it contains."""
        at = np.searchsorted(self.terms, ids)
        present = at < len(self.terms)
        present[present] = self.terms[at[present]] == ids[present]
        return at, present

    def frequencies(self, terms: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of postings of terms, given by position."""
        return self.term_postings[terms + 1] - self.term_postings[terms]

    def impact(self, term: int, number: int) -> int:
        """Return the impact of a term, given by position, in one document; 0 if the document lacks it."""
        block, place = divmod(number, sparse_search.BLOCK)
        begin, end = self.term_starts[term : term + 2]
        b = int(begin + np.searchsorted(self.blocks[begin:end], block))
        if b == end or self.blocks[b] != block:
            return 0
        start = int(sparse_search.start_of(self.sizes, self.skips, b))
        part = slice(start, start + int(self.sizes[b]))
        p = int(np.searchsorted(self.places[part], place))
        present = p < len(self.places[part]) and self.places[part][p] == place
        return int(self.impacts[part][p]) if present else 0

    def search(
        self,
        ids: NDArray[np.int32],
        weights: NDArray[np.float32],
        k: int,
        least: float,
        allow: NDArray[np.uint8] | None,
        exhaustive: bool,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best documents with a score of ``least`` or more; see `InvertedIndexSearcher.search`."""
        at, present = self.at(ids)
        present &= weights > 0
        terms, weights = at[present], weights[present]
        if exhaustive or self.frequencies(terms).sum() + self.count * sparse_search.BLOCK <= EXHAUSTIVE:
            lists = self.term_starts, self.blocks, self.sizes, self.skips, self.places, self.impacts
            bitmap, filtered = (NO_FILTER, False) if allow is None else (allow, True)
            return sparse_search.search_all(
                *lists, terms, weights, self.first, self.count, k, np.float32(least), bitmap, filtered
            )
        bounds = sparse_search.block_bounds(
            self.term_starts, self.blocks, self.tops, terms, weights, self.first, self.count
        )
        if allow is not None:
            bounds[~_any_allowed(allow, self.first, self.count)] = 0
        candidates = np.flatnonzero((bounds > 0) & (bounds >= least))
        promising = FIRST + k
        while len(candidates) > 2 * promising:
            top = candidates[np.argpartition(-bounds[candidates], promising)[:promising]]
            top_scores = self._scored(np.sort(top), terms, weights, k, least, allow)[1]
            if len(top_scores) >= k:
                least = max(least, float(top_scores[-1]))
                candidates = candidates[bounds[candidates] >= least]
            promising *= MORE
        return self._scored(candidates, terms, weights, k, least, allow)

    def _scored(
        self,
        chosen: NDArray[np.int64],
        terms: NDArray[np.int64],
        weights: NDArray[np.float32],
        k: int,
        least: float,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best documents of the selected blocks."""
        blocks = (chosen + self.first).astype(np.int32)
        lists = self.term_starts, self.blocks, self.sizes, self.skips, self.places, self.impacts
        scores = sparse_search.score_blocks(*lists, terms, weights, self.first, self.count, blocks)
        places = np.flatnonzero((scores > 0) & (scores >= least))
        documents = blocks[places // sparse_search.BLOCK] * sparse_search.BLOCK + places % sparse_search.BLOCK
        passing = is_allowed(allow, documents)
        return top_documents(documents[passing].astype(np.int32), scores[places[passing]], k)


class InvertedIndexSearcher:
    """Searcher of the segments of one snapshot."""

    def __init__(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> None:
        """Wrap and check the arrays of a snapshot.

        Raises:
            ValueError: The arrays do not fit each other.
        """
        self.step = float(shared["step"][0])
        self.parts = [SegmentSearcher(s, documents) for s in segments if len(s["blocks"])]
        self.count = sum(len(s["documents"]) for s in segments)

    def frequencies(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the document frequency of each term; deleted documents count until their segment is merged."""
        counts = np.zeros(len(ids), np.int64)
        for part in self.parts:
            at, present = part.at(ids)
            counts[present] += part.frequencies(at[present])
        return counts

    def weights(self, number: int, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the weights of terms in one document, [ids]."""
        weights = np.zeros(len(ids), np.float32)
        for part in self.parts:
            at, present = part.at(ids)
            for i in np.flatnonzero(present):
                weights[i] += np.float32(self.step) * part.impact(int(at[i]), number)
        return weights

    def search(
        self,
        query: SparseVectors,
        k: int,
        allow: NDArray[np.uint8] | None = None,
        exhaustive: bool = False,
        weights: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best documents and their inner products with a query, best first; ties are in doc id order.

        Args:
            query: Term weights of one text.
            k: Maximum number of documents.
            allow: Bitmap of the allowed documents, least significant bit first; None for all.
            exhaustive: Whether every document with a query term is scored; the result is the same.
            weights: [terms] weights of the query's terms, in place of its values.
        """
        weights = (query.values if weights is None else weights) * np.float32(self.step)
        documents, scores = np.empty(0, np.int32), np.empty(0, np.float32)
        for part in self.parts:
            least = float(scores[k - 1]) if len(scores) >= k else 0.0
            more = part.search(query.indices, weights, k, least, allow, exhaustive)
            if len(documents):
                more = top_documents(np.append(documents, more[0]), np.append(scores, more[1]), k)
            documents, scores = more
        return documents, scores


def _any_allowed(allow: NDArray[np.uint8], first: int, count: int) -> NDArray[np.bool_]:
    """Return which blocks contain an allowed document, [count]."""
    size = sparse_search.BLOCK // 8
    bits = np.zeros((first + count) * size, np.uint8)
    bits[: min(len(allow), len(bits))] = allow[: len(bits)]
    return np.any(bits.reshape(-1, size)[first:], axis=1)
