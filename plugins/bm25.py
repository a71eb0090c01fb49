"""BM25 (Robertson and others, TREC-3), in Lucene's form.

Documents are scored by the terms that they share with the query:

    score = sum over the terms w of the query of idf(w) tf(w) / (tf(w) + k1 (1 - b + b length / mean length))
    idf(w) = log(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

The inverted lists hold the fraction as the impact of a term; idf is computed from the lengths of the lists at search
time. The mean length is that of the first documents. It is recomputed while the index is small.
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

BITS = 8  # of a quantised impact


@dataclass(frozen=True)
class BM25Options:
    """Options of BM25, fixed when an index is built.

    Attributes:
        k1: Term frequency saturation: the lower, the less repetitions of a term count.
        b: Length normalisation, 0 to 1: the higher, the lower long documents score.
        language: Language of the Snowball stemmer; ``none`` for unstemmed terms.
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
    """BM25 over inverted lists; needs no model."""

    name: ClassVar[str] = "bm25"
    default_encoder: ClassVar[str] = "stems"
    divisible: ClassVar[bool] = False
    Options: ClassVar[type] = BM25Options

    def __init__(self, options: BM25Options) -> None:
        self.options = options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """Load the encoder ``stems``, the only one of this index type."""
        from ..retrieval.encoders import stems
        from ..retrieval.errors import RetrievalError

        if (device, precision) not in (("auto", "float32"), ("cpu", "float32")):
            raise RetrievalError("bm25 uses no model; remove --device and --precision")
        if name != stems.STEMS:
            raise RetrievalError(f"encoder {name}: bm25 supports the encoder {stems.STEMS} only")
        return stems.load_stem_encoder(self.options.language)

    def train(self, encoded: "SparseVectors", expected: int) -> Arrays:
        """Compute the mean length of a document."""
        del expected
        mean = float(encoded.values.sum()) / max(len(encoded), 1)
        step = np.array([1 / ((1 << BITS) - 1)], np.float32)
        return {
            "step": step,
            "mean": np.array([max(mean, 1)], np.float32),
            "trained": np.array([len(encoded)], np.int64),
        }

    def segment(self, encoded: "SparseVectors", numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Build inverted lists, whose impacts are the fractions of the formula."""
        from ..retrieval import sparse_index

        o, tf = self.options, encoded.values
        lengths = np.bincount(encoded.text_ids, tf).astype(np.float32)[encoded.text_ids]
        parts = tf / (tf + o.k1 * (1 - o.b + o.b * lengths / shared["mean"][0]))
        built = sparse_index.build_sparse_segment(
            replace(encoded, values=parts.astype(np.float32)), numbers, shared, BITS
        )
        return len(built["places"]), built

    def search(
        self,
        searcher: "InvertedIndexSearcher",
        query: "SparseVectors",
        k: int,
        settings: NoOptions,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the documents with the highest scores."""
        del settings
        return searcher.search(query, k, allow, weights=self.idf_weights(searcher, query))

    @staticmethod
    def idf_weights(searcher: "InvertedIndexSearcher", query: "SparseVectors") -> NDArray[np.float32]:
        """Return the weight of each query term, [terms]: its idf times its number of occurrences."""
        df = searcher.frequencies(query.indices)
        idf = np.log1p((searcher.count - df + 0.5) / (df + 0.5))
        return (query.values * idf).astype(np.float32)

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
        """Return the stems that query and document share, with their contributions to the score."""
        from ..retrieval.encoders import stems

        del text, settings, allow
        names = {stems.stem_id(s): s for s in encoder.stems(query, query=True)}
        terms = encoder.encode_queries([query])[0]
        weighted = replace(terms, values=self.idf_weights(searcher, terms))
        return explain_shared_terms(searcher, weighted, number, names.__getitem__)


@hookimpl
def register_indexes(register: Register) -> None:
    """Register the plugin."""
    register(BM25)
