"""Arrays of an XTR index: shared arrays, inverted lists of a segment, and the search in them.

    shared    projection [in, d], centroids [lists, d], owners [lists], trained [1] number of training documents, and
              the arrays of the codec
    segment   starts [lists + 1], documents [rows], codes [rows, size]; with ``vectors`` also vectors [tokens, d]
              float16, offsets [documents + 1] and numbers [documents], in doc id order, for exact re-ranking

d is a multiple of 64, so that the kernels process full vector registers.
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
ROWS = 1 << 16  # tokens encoded at once
FEW = 4096  # with fewer training residuals, random ones are added


@dataclass(frozen=True)
class TokenIndexLayout:
    """Layout of a token index.

    Attributes:
        codec: Codec of the residuals; see `codecs`.
        dimension: Dimension to which longer vectors are projected; 0 for no projection.
        lists: Number of inverted lists; 0 for four times the square root of the number of tokens.
        by_token: Whether the tokens of each vocabulary entry are clustered separately.
        vectors: Whether uncompressed vectors are kept too, for exact re-ranking.
    """

    codec: str = "sq4"
    dimension: int = 128
    lists: int = 0
    by_token: bool = True
    vectors: bool = False

    @property
    def coder(self) -> Codec:
        """Codec of the residuals."""
        return CODECS[self.codec]


def train_token_index(
    tokens: TokenEmbeddings, layout: TokenIndexLayout, expected: int, seed: int = 0
) -> dict[str, NDArray]:
    """Train the shared arrays on the first documents of an index that will have about ``expected`` documents."""
    projection = make_projection(tokens.vectors, layout, seed)
    vectors = project(tokens.vectors, projection)
    all_tokens = round(len(vectors) * max(expected, len(tokens)) / max(len(tokens), 1))
    lists = layout.lists or clustering.default_num_lists(all_tokens)
    clusters = clustering.train_centroids(
        vectors, tokens.token_ids if layout.by_token else None, min(lists, len(vectors)), seed
    )
    sample = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
    residuals = vectors[sample] - clusters.centroids[clusters.assign(vectors[sample], tokens.token_ids[sample])]
    if len(residuals) < FEW:
        # With few tokens, almost every token has its own centroid, and the residuals are far smaller than those of
        # later tokens. Random residuals with a norm of about 0.7 represent these.
        d = residuals.shape[1]
        random = np.random.default_rng(seed).normal(0, 0.7 / np.sqrt(d), (FEW, d)).astype(np.float32)
        residuals = np.concatenate([residuals, random])
    return {
        "projection": projection,
        "centroids": clusters.centroids,
        "owners": clusters.owners,
        "trained": np.array([len(tokens)], np.int64),
        **layout.coder.train(residuals),
    }


def make_projection(vectors: NDArray, layout: TokenIndexLayout, seed: int) -> NDArray[np.float32]:
    """Compute the projection, [in, d].

    It projects to the principal axes if that reduces the dimension, pads the dimension to a multiple of `ALIGN`, and
    rotates if the codec needs it.
    """
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
    """Project vectors and scale them to unit length, [n, d]."""
    projected = vectors.astype(np.float32) @ projection
    return projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-9)


def build_token_segment(
    tokens: TokenEmbeddings, numbers: NDArray[np.int64], shared: Arrays, layout: TokenIndexLayout
) -> dict[str, NDArray]:
    """Build the inverted lists of documents.

    Args:
        tokens: Token embeddings of the documents.
        numbers: [documents] internal doc ids, ascending.
        shared: Shared arrays; see `train_token_index`.
        layout: Layout of the index.
    """
    clusters = Clusters(shared["centroids"], shared["owners"])
    lists = np.empty(len(tokens.token_ids), np.int32)
    codes = np.empty((len(lists), layout.coder.size(shared["centroids"].shape[1])), np.uint8)
    uncompressed = np.empty((len(lists), shared["centroids"].shape[1]), np.float16) if layout.vectors else None
    for begin in range(0, len(lists), ROWS):
        part = slice(begin, begin + ROWS)
        vectors = project(tokens.vectors[part], shared["projection"])
        lists[part] = clusters.assign(vectors, tokens.token_ids[part])
        codes[part] = layout.coder.encode(shared, vectors - clusters.centroids[lists[part]])
        if uncompressed is not None:
            uncompressed[part] = vectors
    order = np.argsort(lists, kind="stable")  # stable: doc id order within a list
    documents = numbers[tokens.text_ids].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=len(clusters.centroids)))])
    segment = {"starts": starts.astype(np.int64), "documents": documents[order], "codes": codes[order]}
    if uncompressed is not None:
        offsets = np.concatenate([[0], np.cumsum(tokens.counts)]).astype(np.int64)
        segment |= {"vectors": uncompressed, "offsets": offsets, "numbers": numbers.astype(np.int64)}
    return segment


def merge_token_segments(segments: Sequence[Arrays], live: NDArray[np.bool_]) -> dict[str, NDArray]:
    """Merge segments into one, without the documents that are not ``live``."""
    masks = [live[s["documents"]] for s in segments]
    lists = np.concatenate(
        [
            np.repeat(np.arange(len(s["starts"]) - 1, dtype=np.int32), np.diff(s["starts"]))[k]
            for s, k in zip(segments, masks, strict=True)
        ]
    )
    order = np.argsort(lists, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=len(segments[0]["starts"]) - 1))])
    merged = {"starts": starts.astype(np.int64)}
    for name in ("documents", "codes"):
        merged[name] = np.concatenate([s[name][k] for s, k in zip(segments, masks, strict=True)])[order]
    if "vectors" in segments[0]:
        alive = [live[s["numbers"]] for s in segments]
        counts = [np.diff(s["offsets"]) for s in segments]
        numbers = np.concatenate([s["numbers"][a] for s, a in zip(segments, alive, strict=True)])
        vectors = np.concatenate(
            [s["vectors"][np.repeat(a, c)] for s, a, c in zip(segments, alive, counts, strict=True)]
        )
        remaining = np.concatenate([c[a] for a, c in zip(alive, counts, strict=True)])
        order = np.argsort(numbers)  # a merged segment may come after newer ones
        merged["numbers"] = numbers[order]
        merged["vectors"] = vectors[np.argsort(np.repeat(numbers, remaining), kind="stable")]
        merged["offsets"] = np.concatenate([[0], np.cumsum(remaining[order])]).astype(np.int64)
    return merged


class TokenIndexSearcher:
    """Searcher of the segments of one snapshot."""

    def __init__(self, shared: Arrays, segments: Sequence[Arrays], documents: int, layout: TokenIndexLayout) -> None:
        """Wrap and check the arrays of a snapshot.

        Raises:
            ValueError: The arrays do not fit each other.
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
        """Return the best documents and their scores, means over query tokens (XTR, equation 4).

        Args:
            query: [tokens, in] query vectors from the encoder.
            k: Maximum number of documents.
            settings: Search settings.
            allow: Bitmap of the allowed documents, least significant bit first; None for all.
            traced: Internal doc id of a document whose score is returned by query token; None for no trace.
        """
        vectors = project(query, self._shared["projection"])
        near = self.centroids @ vectors.T  # in this order BLAS is faster for few query tokens
        return self.tokens.search(vectors, near, k, settings, allow, traced)

    def exact(self, query: NDArray, documents: Sequence[int]) -> NDArray[np.float32]:
        """Compute exact MaxSim scores of documents: the mean over query tokens of the largest inner product.

        Raises:
            KeyError: The index has no uncompressed vectors.
        """
        vectors = project(query, self._shared["projection"])
        scores = np.full(len(documents), -np.inf, np.float32)
        for s in self._segments:
            at = np.searchsorted(s["numbers"], documents)
            for i, place in enumerate(at.tolist()):
                if place < len(s["numbers"]) and s["numbers"][place] == documents[i]:
                    begin, end = s["offsets"][place : place + 2]
                    if end > begin:
                        products = vectors @ s["vectors"][begin:end].astype(np.float32).T
                        scores[i] = products.max(1).mean()
        return scores
