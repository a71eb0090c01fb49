"""BM25 (Robertson and others, TREC-3, in Lucene's form): words that query and document share, rare ones the more.

    score = sum over words of the query of idf(w) tf(w) / (tf(w) + k1 (1 - b + b length / mean length))
    idf(w) = log(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

The fraction is what the sparse index keeps of a document; idf follows from its lists when it is searched. The mean
length is that of the first documents; the index learns it anew while it has few.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, NoOptions, ScoreExplanation
from .hookspecs import Register, hookimpl
from .inverted_index_kind import InvertedIndexKind, explain_shared_terms

if TYPE_CHECKING:
    from ..retrieval.sparse_index import InvertedIndexSearcher
    from ..retrieval.sparse_vectors import SparseVectors

BITS = 8


@dataclass(frozen=True)
class BM25Options:
    """Options of BM25, fixed when an index is made.

    Attributes:
        k1: How soon more of the same word counts no more.
        b: How much long documents are held against.
        language: Of the stemmer, one of Snowball's; `none` for words as they are.
    """

    k1: float = 0.9
    b: float = 0.4
    language: str = "english"

    def __post_init__(self) -> None:
        if not 0 < self.k1 <= 100:
            raise ValueError(f"k1: expected above 0 to 100, got {self.k1}")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b: expected 0 to 1, got {self.b}")


class BM25(InvertedIndexKind):
    """Shared words; see the module."""

    name: ClassVar[str] = "bm25"
    default_encoder: ClassVar[str] = "stems"
    divisible: ClassVar[bool] = False
    Options: ClassVar[type] = BM25Options

    def __init__(self, options: BM25Options) -> None:
        self.options = options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """``stems``."""
        from ..retrieval.encoders import stems
        from ..retrieval.errors import RetrievalError

        if (device, precision) not in (("auto", "float32"), ("cpu", "float32")):
            raise RetrievalError("bm25 runs no model: --device and --precision are not for it")
        if name != stems.STEMS:
            raise RetrievalError(f"encoder {name}: bm25 has {stems.STEMS} alone")
        return stems.load_stem_encoder(self.options.language)

    def train(self, encoded: "SparseVectors", expected: int) -> Arrays:
        """The mean length of a document."""
        del expected
        mean = float(encoded.values.sum()) / max(len(encoded), 1)
        step = np.array([1 / ((1 << BITS) - 1)], np.float32)
        return {
            "step": step,
            "mean": np.array([max(mean, 1)], np.float32),
            "trained": np.array([len(encoded)], np.int64),
        }

    def segment(self, encoded: "SparseVectors", numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Inverted lists of tf parts."""
        from ..retrieval import sparse_index

        o, tf = self.options, encoded.values
        lengths = np.bincount(encoded.text_ids, tf).astype(np.float32)[encoded.text_ids]
        parts = tf / (tf + o.k1 * (1 - o.b + o.b * lengths / shared["mean"][0]))
        made = sparse_index.build_sparse_segment(
            replace(encoded, values=parts.astype(np.float32)), numbers, shared, BITS
        )
        return len(made["places"]), made

    def search(
        self,
        searcher: "InvertedIndexSearcher",
        query: "SparseVectors",
        k: int,
        settings: NoOptions,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The greatest sums."""
        del settings
        return searcher.search(self.weighted(searcher, query), k, allow)

    def weighted(self, searcher: "InvertedIndexSearcher", query: "SparseVectors") -> "SparseVectors":
        """A query's stems with their idf, as often as it has them."""
        df = searcher.frequencies(query.indices)
        idf = np.log1p((searcher.count - df + 0.5) / (df + 0.5))
        return replace(query, values=(query.values * idf).astype(np.float32))

    def explain(
        self,
        searcher: "InvertedIndexSearcher",
        encoder: Any,
        query: str,
        text: str,
        number: int,
        settings: Any,
        allow: Any,
    ) -> list[ScoreExplanation]:
        """The stems that query and document share, and what each adds."""
        from ..retrieval.encoders import stems

        del text, settings, allow
        names = {stems.stem_id(s): s for s in encoder.stems(query)}
        mine = self.weighted(searcher, encoder.encode_queries([query])[0])
        return explain_shared_terms(searcher, mine, number, names.__getitem__)


@hookimpl
def register_indexes(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(BM25)
