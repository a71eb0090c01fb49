"""Search in a token index: arguments and selection of the kernel.

The kernel is `token_search.cpp` if there is a C++ compiler, else `token_search_numba`, the same algorithm in numba.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal import cpp_build


class Impute(IntEnum):
    """Imputed similarity of a query token and a document of which no token was retrieved for it.

    NOTHING: Zero. WARP: Similarity of the centroid at which the cumulative list size reaches t' (arXiv 2501.17788).
    KPRIME: Smallest of the k' largest retrieved similarities (XTR, arXiv 2304.01982, equation 4).
    """

    NOTHING = 0
    WARP = 1
    KPRIME = 2


@dataclass(frozen=True)
class TokenSearchSettings:
    """Settings of a token search.

    Attributes:
        nprobe: Number of inverted lists that are read for each query token.
        impute: Kind of imputed similarity; see `Impute`.
        t_prime: For WARP: cumulative list size at which the imputed centroid is taken (t').
        bound: For WARP: maximum number of nearest lists among which that centroid is searched.
        kth: For KPRIME: k', number of retrieved tokens.
        keep: Whether similarities below the imputed one are raised to it instead of being dropped, so that their
            documents are found too.
        plain: Whether the kernel avoids vector instructions, for tests.
    """

    nprobe: int
    impute: Impute = Impute.WARP
    t_prime: int = 2000
    bound: int = 256
    kth: int = 1000
    keep: bool = False
    plain: bool = False


@dataclass(frozen=True)
class InvertedLists:
    """Inverted lists of one segment, concatenated.

    Attributes:
        starts: [lists + 1] int64 first posting of each list.
        documents: [rows] int32 internal doc id of each posting.
        codes: [rows, size] uint8 code of the residual of each posting.
    """

    starts: NDArray[np.int64]
    documents: NDArray[np.int32]
    codes: NDArray[np.uint8]


@dataclass(frozen=True)
class CodecArrays:
    """Arrays that decode the codes of residuals.

    Attributes:
        kernel: Code format: 0 for 4 bits per dimension, 1 for 8 bits, 2 for float16, 3 for codebooks.
        size: Bytes per code.
        low: [dimension] float32 smallest value of each dimension, for formats 0 and 1.
        step: [dimension] float32 distance of two levels, for formats 0 and 1.
        codebooks: [groups, 256, dimensions per group] float32, for format 3.
    """

    kernel: int
    size: int
    low: NDArray[np.float32]
    step: NDArray[np.float32]
    codebooks: NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """Score of one document, by query token.

    Attributes:
        scores: [tokens] similarity of the best retrieved token; NaN where it is imputed.
        imputed: [tokens] imputed similarity.
    """

    scores: NDArray[np.float32]
    imputed: NDArray[np.float32]


@dataclass(frozen=True)
class _Call:
    """Checked arguments of `TokenSearch.search`; ``documents`` and ``scores`` [k] are outputs."""

    query: NDArray[np.float32]
    near: NDArray[np.float32]
    settings: TokenSearchSettings
    allow: NDArray[np.uint8] | None
    documents: NDArray[np.int32]
    scores: NDArray[np.float32]
    traced: int | None
    trace: Trace | None


class _Segment(ctypes.Structure):
    _fields_ = (("starts", ctypes.c_void_p), ("documents", ctypes.c_void_p), ("codes", ctypes.c_void_p))


class _Index(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dimension", "lists", "codec", "code_size")),
        *((name, ctypes.c_int32) for name in ("groups", "group_size", "factored", "segments")),
        *((name, ctypes.c_void_p) for name in ("low", "step", "codebooks", "sizes", "segment")),
        ("documents", ctypes.c_int64),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nprobe", "bound", "impute", "kth", "k", "keep", "plain")),
        ("t_prime", ctypes.c_int64),
    )


class TokenSearch:
    """Searcher of the inverted lists of some segments, for use from several threads."""

    def __init__(
        self, dimension: int, lists: int, coded: CodecArrays, segments: Sequence[InvertedLists], documents: int
    ) -> None:
        """Wrap and check arrays. Contiguous arrays are not copied.

        Args:
            dimension: Dimension of the vectors.
            lists: Number of inverted lists, the same in all segments.
            coded: Arrays that decode the codes.
            segments: Inverted lists of each segment; may be empty.
            documents: Exclusive upper bound of the internal doc ids.

        Raises:
            ValueError: The arrays do not fit each other, or a doc id is out of range.
        """
        for s in segments:
            if len(s.starts) != lists + 1 or int(s.starts[-1]) != len(s.documents) or len(s.codes) != len(s.documents):
                raise ValueError(f"{len(s.starts)} starts, {len(s.documents)} documents, {len(s.codes)} codes")
            if s.codes.shape[1] != coded.size:
                raise ValueError(f"codes of {s.codes.shape[1]} bytes, not {coded.size}")
            if s.starts[0] != 0 or (np.diff(s.starts) < 0).any():
                raise ValueError("lists that do not follow each other")
            if len(s.documents) and not 0 <= s.documents.min() <= s.documents.max() < documents:
                raise ValueError(f"numbers of documents beyond {documents}")
        self.dimension, self.lists, self.coded, self.documents = dimension, lists, coded, documents
        self.segments = [
            InvertedLists(
                np.ascontiguousarray(s.starts, np.int64),
                np.ascontiguousarray(s.documents, np.int32),
                np.ascontiguousarray(s.codes),
            )
            for s in segments
        ]
        self.sizes = sum((np.diff(s.starts) for s in self.segments), np.zeros(lists, np.int64))
        books = coded.codebooks
        self.factored = len(books) > 0 and coded.size == len(books) + 2
        self._segments = (_Segment * max(len(self.segments), 1))(
            *(_Segment(s.starts.ctypes.data, s.documents.ctypes.data, s.codes.ctypes.data) for s in self.segments)
        )
        self._index = _Index(
            dimension,
            lists,
            coded.kernel,
            coded.size,
            len(books),
            books.shape[2] if len(books) else 0,
            self.factored,
            len(self.segments),
            coded.low.ctypes.data,
            coded.step.ctypes.data,
            books.ctypes.data,
            self.sizes.ctypes.data,
            ctypes.addressof(self._segments),
            documents,
        )

    def impute_by(self, sizes: NDArray[np.int64]) -> None:
        """Set the list sizes from which similarities are imputed, [lists]: in a shard, those of all shards together."""
        if sizes.shape != (self.lists,) or (sizes < self.sizes).any():
            raise ValueError(f"sizes {sizes.shape} for {self.lists} lists")
        self.sizes = np.ascontiguousarray(sizes, np.int64)
        self._index.sizes = self.sizes.ctypes.data

    def search(
        self,
        query: NDArray[np.float32],
        near: NDArray[np.float32],
        k: int,
        settings: TokenSearchSettings,
        allow: NDArray[np.uint8] | None = None,
        traced: int | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], Trace | None]:
        """Return the best documents and their scores, best first; ties are in doc id order.

        A score is the mean over query tokens of the largest retrieved similarity, or the imputed one.

        Args:
            query: [tokens, dimension] query vectors.
            near: [lists, tokens] inner products of centroids and query vectors.
            k: Maximum number of documents.
            settings: Search settings.
            allow: Bitmap of the allowed documents, least significant bit first; None for all.
            traced: Internal doc id of a document whose score is returned by query token; None for no trace.
        """
        if allow is not None and 8 * len(allow) < self.documents:
            raise ValueError(f"{8 * len(allow)} bits for {self.documents} documents")
        query, near = np.ascontiguousarray(query, np.float32), np.ascontiguousarray(near, np.float32)
        if query.shape[1] != self.dimension or near.shape != (self.lists, len(query)):
            raise ValueError(f"queries {query.shape} and products {near.shape}")
        k = min(k, self.documents)
        documents, scores = np.empty(k, np.int32), np.empty(k, np.float32)
        trace = None
        if traced is not None:
            trace = Trace(np.empty(len(query), np.float32), np.empty(len(query), np.float32))
        call = _Call(query, near, settings, allow, documents, scores, traced, trace)
        kernel = _compiled()
        count = self._run_numba(call) if kernel is None else self._run(kernel, call)
        return documents[:count], scores[:count], trace

    def _run(self, kernel: Callable[..., int], c: _Call) -> int:
        s = c.settings
        k = len(c.documents)
        set_ = _Settings(s.nprobe, s.bound, int(s.impute), s.kth, k, s.keep, s.plain, s.t_prime)
        return kernel(
            ctypes.byref(self._index),
            c.query.ctypes.data,
            c.near.ctypes.data,
            len(c.query),
            ctypes.byref(set_),
            None if c.allow is None else c.allow.ctypes.data,
            c.documents.ctypes.data,
            c.scores.ctypes.data,
            -1 if c.traced is None else c.traced,
            None if c.trace is None else c.trace.scores.ctypes.data,
            None if c.trace is None else c.trace.imputed.ctypes.data,
        )

    def _run_numba(self, c: _Call) -> int:
        from .token_search_numba import search_tokens

        s, coded = c.settings, self.coded
        nothing = np.empty(0, np.float32)
        return search_tokens(
            tuple((x.starts, x.documents, x.codes) for x in self.segments),
            self.sizes,
            (coded.kernel, coded.low, coded.step, coded.codebooks, self.factored),
            c.query,
            c.near,
            (s.nprobe, int(s.impute), s.t_prime, s.bound, s.kth, s.keep),
            np.empty(0, np.uint8) if c.allow is None else c.allow,
            self.documents,
            c.documents,
            c.scores,
            -1 if c.traced is None else c.traced,
            nothing if c.trace is None else c.trace.scores,
            nothing if c.trace is None else c.trace.imputed,
        )


@functools.cache
def _compiled() -> Callable[..., int] | None:
    """Return the C++ kernel, or None if it cannot be compiled."""
    try:
        kernel = cpp_build.load("token_search", Path(__file__).parent).token_search
    except (cpp_build.NoCompiler, OSError):
        return None
    pointer = ctypes.c_void_p
    kernel.argtypes = [pointer, pointer, pointer, ctypes.c_int, pointer, pointer, pointer, pointer]
    kernel.argtypes += [ctypes.c_int32, pointer, pointer]
    kernel.restype = ctypes.c_int
    return kernel
