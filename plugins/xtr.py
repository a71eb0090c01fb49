"""XTR, contextualised token retrieval (arXiv 2304.01982): documents are ranked with the retrieved tokens alone.

    for each of the n tokens of a query: the nearest tokens of the whole collection
    score(document) = (1/n) sum over i of the best product among its tokens retrieved for i,
                      or, where none was, the imputed value m_i

m_i is the least retrieved product in the paper (``impute=kprime``). The default is cheaper: the product with the
centroid behind which a number of tokens lie (WARP, arXiv 2501.17788); products below m_i count as m_i. What the arrays
are and how they are searched is in `retrieval.xtr`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind, ScoreExplanation
from .hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from ..retrieval.kernels import token_search
    from ..retrieval.xtr.index import TokenIndexLayout, TokenIndexSearcher

CODECS = ("sq4", "sq8", "float16", "pq", "rabitq")
IMPUTE = ("warp", "kprime", "none")
FEW, MANY = 64, 1000  # documents that centroids and codec were learned from
WIDER = 4  # times as many lists are read, while too few documents pass a filter


@dataclass(frozen=True)
class XTROptions:
    """Options of XTR, fixed when an index is made.

    Attributes:
        codec: How tokens are kept: `sq4`, `sq8`, `float16`, `pq` or `rabitq`.
        dimension: Vectors with more dimensions are projected to so many; 0 for never.
        nlist: Clusters of tokens; 0 for four times the square root of their number.
        cluster: `tokens` clusters the tokens of each vocabulary entry by themselves, `kmeans` all together.
        vectors: Keep whole vectors too, 2 bytes a dimension, so that `rerank` is exact.
    """

    codec: str = "sq4"
    dimension: int = 128
    nlist: int = 0
    cluster: str = "tokens"
    vectors: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("codec", CODECS), ("cluster", ("tokens", "kmeans"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, high in (("dimension", 4096), ("nlist", 1 << 20)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected 0 to {high}, got {getattr(self, name)}")


@dataclass(frozen=True)
class XTRSettings:
    """How an XTR index is searched.

    Attributes:
        nprobe: Lists that are read for each query token.
        impute: What a document gets for a query token that found none of its tokens: `warp`, `kprime` or `none`.
        t_prime: Of warp: tokens in the nearest lists, behind which the imputed centroid stands; 0 for a value that
            follows from the size of the index. `pilotfish index tune` finds one.
        kprime: Of kprime: retrieved tokens that count.
        rerank: So many of the best documents are scored by all their tokens; the index has to keep `vectors`.
        all: Find documents, too, of which no token beats what is imputed; they are the last.
    """

    nprobe: int = 16
    impute: str = "warp"
    t_prime: int = 0
    kprime: int = 1000
    rerank: int = 0
    all: bool = False

    def __post_init__(self) -> None:
        if self.impute not in IMPUTE:
            raise ValueError(f"impute: expected {', '.join(IMPUTE)}, got {self.impute!r}")
        for name, low, high in (
            ("nprobe", 1, 1 << 20),
            ("t_prime", 0, 1 << 40),
            ("kprime", 1, 1 << 24),
            ("rerank", 0, 10_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {getattr(self, name)}")


class XTR(IndexKind):
    """Token retrieval; see the module."""

    name: ClassVar[str] = "xtr"
    default_encoder: ClassVar[str] = "minilm"
    Options: ClassVar[type] = XTROptions
    Settings: ClassVar[type] = XTRSettings

    def __init__(self, options: XTROptions) -> None:
        self.options = options

    @property
    def layout(self) -> "TokenIndexLayout":
        """The options as the arrays' makers know them."""
        from ..retrieval.xtr.index import TokenIndexLayout

        o = self.options
        return TokenIndexLayout(o.codec, o.dimension, o.nlist, o.cluster == "tokens", o.vectors)

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """A multi-vector encoder: ``minilm``, or the folder of a checkpoint."""
        from ..retrieval.encoders import load_multi_vector_encoder

        return load_multi_vector_encoder(name, device, precision)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """Projection, centroids and codec."""
        from ..retrieval.xtr import index

        return index.train_token_index(encoded, self.layout, expected)

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """With few documents at once, with some when they double, with many when somebody asks for it."""
        trained = int(shared["trained"][0])
        return documents > trained if trained < FEW else trained < MANY and documents >= 2 * trained

    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Lists of coded tokens."""
        from ..retrieval.xtr import index

        return len(encoded.ids), index.build_token_segment(encoded, numbers, shared, self.layout)

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Lists behind each other."""
        from ..retrieval.xtr import index

        merged = index.merge_token_segments(segments, live)
        return len(merged["documents"]), merged

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> "TokenIndexSearcher":
        """The kernel's view of a snapshot."""
        from ..retrieval.xtr.index import TokenIndexSearcher

        return TokenIndexSearcher(shared, segments, documents, self.layout)

    def search(
        self, searcher: "TokenIndexSearcher", query: Any, k: int, settings: XTRSettings, allow: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The best documents by retrieved tokens, or, of the best, by all their tokens."""
        from ..retrieval.errors import RetrievalError

        wanted = max(k, settings.rerank)
        documents, scores, _ = searcher.search(query.vectors, wanted, self.kernel_settings(searcher, settings), allow)
        if settings.rerank and len(documents):
            if not self.options.vectors:
                raise RetrievalError("rerank: the index keeps no vectors; build it with --option vectors=true")
            best = searcher.exact(query.vectors, documents[: settings.rerank].tolist())
            order = np.argsort(-best, kind="stable")
            documents = np.concatenate([documents[: settings.rerank][order], documents[settings.rerank :]])
            scores = np.concatenate([best[order], scores[settings.rerank :]])
        return documents[:k], scores[:k]

    def wider(self, settings: XTRSettings, searcher: "TokenIndexSearcher") -> XTRSettings | None:
        """Four times as many lists; documents count then of which no token beats what is imputed, too."""
        if settings.nprobe >= searcher.tokens.lists and settings.all:
            return None
        return replace(settings, nprobe=min(settings.nprobe * WIDER, 1 << 20), all=True)

    def explain(
        self,
        searcher: "TokenIndexSearcher",
        encoder: Any,
        query: str,
        text: str,
        number: int,
        settings: XTRSettings,
        allow: Any,
    ) -> list[ScoreExplanation]:
        """For each query token the product that counted, and the document's token that is nearest to it."""
        encoded, words = encoder.encode_queries([query]), encoder.words(query, query=True)
        mine, tokens = encoder.encode_documents([text]), encoder.words(text, query=False)
        _, _, trace = searcher.search(encoded.vectors, 1, self.kernel_settings(searcher, settings), allow, number)
        assert trace is not None
        nearest = (encoded.vectors @ mine.vectors.astype(np.float32).T).argmax(1) if len(tokens) else None
        share = 1 / max(len(words), 1)
        reasons = []
        for i, word in enumerate(words):
            imputed = bool(np.isnan(trace.scores[i]))
            score = float(trace.imputed[i] if imputed else trace.scores[i]) * share
            place = None if imputed or nearest is None else int(nearest[i])
            reasons.append(ScoreExplanation(word, None if place is None else tokens[place], score, imputed, place))
        return reasons

    def kernel_settings(
        self, searcher: "TokenIndexSearcher", settings: XTRSettings
    ) -> "token_search.TokenSearchSettings":
        """Settings as the kernel wants them."""
        from ..retrieval.kernels.token_search import Impute, TokenSearchSettings

        impute = {"warp": Impute.WARP, "kprime": Impute.KPRIME, "none": Impute.NOTHING}[settings.impute]
        t_prime = settings.t_prime or default_t_prime(int(searcher.tokens.sizes.sum()))
        return TokenSearchSettings(settings.nprobe, impute, t_prime, kth=settings.kprime, keep=settings.all)


def default_t_prime(tokens: int) -> int:
    """WARP's t': the square root of twice the tokens, from 100 to 50,000.

    A quarter of what WARP's own implementation takes: on cranfield, med and vaswani with MiniLM this ranks as the exact
    search does within .01 of nDCG@10.
    """
    return int(np.clip(np.sqrt(2 * tokens), 100, 50_000))


@hookimpl
def register_indexes(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(XTR)
