"""Arrays of an XTR index: what all segments share, postings of a segment, and the search over them.

    shared    projection [in, d], centroids [lists, d], owners [lists], trained [1] documents, and the codec's own
    segment   starts [lists + 1], documents [rows], codes [rows, size]; with `vectors` also vectors [tokens, d] float16
              and offsets [documents + 1], numbers [documents], in the order of documents, for exact re-ranking

d is a multiple of 64, so that kernels meet whole vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels.token_search import CodecArrays, InvertedLists, TokenSearch, TokenSearchSettings, Trace
from ..token_embeddings import TokenEmbeddings
from . import clustering
from .clustering import Clusters
from .codecs import CODECS, SAMPLE, Codec

Arrays = Mapping[str, NDArray]
ALIGN = 64
ROWS = 1 << 16  # tokens that are coded at once
FEW = 4096  # residuals


@dataclass(frozen=True)
class TokenIndexLayout:
    """What an index is made of.

    Attributes:
        codec: Of residuals; see `codecs`.
        dimension: Vectors are projected to so many dimensions where they have more; 0 for never.
        lists: Of tokens; 0 for four times the square root of their number.
        by_token: Cluster the tokens of each vocabulary entry by themselves.
        vectors: Keep whole vectors too, for exact re-ranking.
    """

    codec: str = "sq4"
    dimension: int = 128
    lists: int = 0
    by_token: bool = True
    vectors: bool = False

    @property
    def coder(self) -> Codec:
        """The codec itself."""
        return CODECS[self.codec]


def train_token_index(
    tokens: TokenEmbeddings, layout: TokenIndexLayout, expected: int, seed: int = 0
) -> dict[str, NDArray]:
    """The shared arrays, from the first of ``expected`` documents of an index."""
    projection = make_projection(tokens.vectors, layout, seed)
    vectors = project(tokens.vectors, projection)
    all_tokens = round(len(vectors) * max(expected, len(tokens)) / max(len(tokens), 1))
    lists = layout.lists or clustering.default_num_lists(all_tokens)
    clusters = clustering.train_centroids(
        vectors, tokens.token_ids if layout.by_token else None, min(lists, len(vectors)), seed
    )
    chosen = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
    residuals = vectors[chosen] - clusters.centroids[clusters.assign(vectors[chosen], tokens.token_ids[chosen])]
    if len(residuals) < FEW:
        # Few tokens have centroids almost to themselves, and their residuals say nothing of those of tokens to come:
        # these are like a good part of a vector.
        d = residuals.shape[1]
        unknown = np.random.default_rng(seed).normal(0, 0.7 / np.sqrt(d), (FEW, d)).astype(np.float32)
        residuals = np.concatenate([residuals, unknown])
    return {
        "projection": projection,
        "centroids": clusters.centroids,
        "owners": clusters.owners,
        "trained": np.array([len(tokens)], np.int64),
        **layout.coder.train(residuals),
    }


def make_projection(vectors: NDArray, layout: TokenIndexLayout, seed: int) -> NDArray[np.float32]:
    """[in, d]: onto the principal axes where that saves dimensions, rotated where the codec wants it, padded."""
    wide = vectors.shape[1]
    narrow = min(wide, layout.dimension or wide)
    d = -(-narrow // ALIGN) * ALIGN
    axes = np.eye(wide, narrow, dtype=np.float32)
    if narrow < wide:
        rng = np.random.default_rng(seed)
        sample = vectors[rng.permutation(len(vectors))[:SAMPLE]].astype(np.float32)
        axes = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :narrow].astype(np.float32)
    padded = np.zeros((wide, d), np.float32)
    padded[:, :narrow] = axes
    if layout.coder.rotates:
        padded = padded @ np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0].astype(np.float32)
    return padded


def project(vectors: NDArray, projection: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, d] vectors of length one."""
    found = vectors.astype(np.float32) @ projection
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def build_token_segment(
    tokens: TokenEmbeddings, numbers: NDArray[np.int64], shared: Arrays, layout: TokenIndexLayout
) -> dict[str, NDArray]:
    """Postings of some documents.

    Args:
        tokens: Theirs.
        numbers: [documents] their internal numbers, ascending.
        shared: See `train`.
        layout: Of the index.
    """
    clusters = Clusters(shared["centroids"], shared["owners"])
    lists = np.empty(len(tokens.token_ids), np.int32)
    codes = np.empty((len(lists), layout.coder.size(shared["centroids"].shape[1])), np.uint8)
    whole = np.empty((len(lists), shared["centroids"].shape[1]), np.float16) if layout.vectors else None
    for begin in range(0, len(lists), ROWS):
        part = slice(begin, begin + ROWS)
        vectors = project(tokens.vectors[part], shared["projection"])
        lists[part] = clusters.assign(vectors, tokens.token_ids[part])
        codes[part] = layout.coder.encode(shared, vectors - clusters.centroids[lists[part]])
        if whole is not None:
            whole[part] = vectors
    order = np.argsort(lists, kind="stable")  # documents stay in order within a list
    documents = numbers[tokens.text_ids].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=len(clusters.centroids)))])
    found = {"starts": starts.astype(np.int64), "documents": documents[order], "codes": codes[order]}
    if whole is not None:
        offsets = np.concatenate([[0], np.cumsum(tokens.counts)]).astype(np.int64)
        found |= {"vectors": whole, "offsets": offsets, "numbers": numbers.astype(np.int64)}
    return found


def merge_token_segments(segments: Sequence[Arrays], live: NDArray[np.bool_]) -> dict[str, NDArray]:
    """One segment of several, without the documents that are not ``live``."""
    kept = [live[s["documents"]] for s in segments]
    lists = np.concatenate(
        [
            np.repeat(np.arange(len(s["starts"]) - 1, dtype=np.int32), np.diff(s["starts"]))[k]
            for s, k in zip(segments, kept, strict=True)
        ]
    )
    order = np.argsort(lists, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=len(segments[0]["starts"]) - 1))])
    found = {"starts": starts.astype(np.int64)}
    for name in ("documents", "codes"):
        found[name] = np.concatenate([s[name][k] for s, k in zip(segments, kept, strict=True)])[order]
    if "vectors" in segments[0]:
        alive = [live[s["numbers"]] for s in segments]
        counts = [np.diff(s["offsets"]) for s in segments]
        numbers = np.concatenate([s["numbers"][a] for s, a in zip(segments, alive, strict=True)])
        vectors = np.concatenate(
            [s["vectors"][np.repeat(a, c)] for s, a, c in zip(segments, alive, counts, strict=True)]
        )
        remaining = np.concatenate([c[a] for a, c in zip(alive, counts, strict=True)])
        order = np.argsort(numbers)  # a segment that was merged before stands behind younger ones
        found["numbers"] = numbers[order]
        found["vectors"] = vectors[np.argsort(np.repeat(numbers, remaining), kind="stable")]
        found["offsets"] = np.concatenate([[0], np.cumsum(remaining[order])]).astype(np.int64)
    return found


class TokenIndexSearcher:
    """The segments of one snapshot, ready to be searched."""

    def __init__(self, shared: Arrays, segments: Sequence[Arrays], documents: int, layout: TokenIndexLayout) -> None:
        """Look at arrays.

        Raises:
            ValueError: they do not fit each other.
        """
        self._shared, self._segments, self._documents = shared, segments, documents
        self.centroids = np.ascontiguousarray(shared["centroids"], np.float32)
        lists, d = self.centroids.shape
        none = np.empty(0, np.float32)
        coded = CodecArrays(
            layout.coder.kernel,
            layout.coder.size(d),
            np.ascontiguousarray(shared.get("low", none), np.float32),
            np.ascontiguousarray(shared.get("step", none), np.float32),
            np.ascontiguousarray(shared.get("codebooks", none.reshape(0, 256, 1)), np.float32),
        )
        postings = [InvertedLists(s["starts"], s["documents"], s["codes"]) for s in segments]
        self.tokens = TokenSearch(d, lists, coded, postings, documents)

    def search(
        self,
        query: NDArray,
        k: int,
        settings: TokenSearchSettings,
        allow: NDArray[np.uint8] | None = None,
        traced: int | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], Trace | None]:
        """The best documents and their scores, the mean over query tokens (XTR, equation 4).

        Args:
            query: [tokens, in] as the encoder made them.
            k: Documents at most.
            settings: See `Settings`.
            allow: A bit for each document, packed; None for all.
            traced: A document whose scores are told, too.
        """
        vectors = project(query, self._shared["projection"])
        near = self.centroids @ vectors.T  # this way round BLAS is the faster for a few tokens
        return self.tokens.search(vectors, near, k, settings, allow, traced)

    def exact(self, query: NDArray, documents: Sequence[int]) -> NDArray[np.float32]:
        """Scores of documents by all their tokens: the mean over query tokens of the best product (MaxSim).

        Raises:
            KeyError: the index keeps no vectors.
        """
        vectors = project(query, self._shared["projection"])
        found = np.full(len(documents), -np.inf, np.float32)
        for s in self._segments:
            at = np.searchsorted(s["numbers"], documents)
            for i, place in enumerate(at.tolist()):
                if place < len(s["numbers"]) and s["numbers"][place] == documents[i]:
                    begin, end = s["offsets"][place : place + 2]
                    if end > begin:
                        products = vectors @ s["vectors"][begin:end].astype(np.float32).T
                        found[i] = products.max(1).mean()
        return found
