"""VDR: vocabulary disentangled retrieval (ICLR 2024).

Queries and documents are lexical representations: one weight for each term of a vocabulary.

    V(text) = elu(z) + 1, max over tokens; z = logits of the encoder over the vocabulary      (section 3.1, elu1p)
    keep the ``top`` largest weights, and those of the text's own terms
    score(query, document) = V(query) . V(document)

The three forms of the paper's code: term weights on both sides (the default); ``query_encoding=bag_of_words``, the
query's own terms with weight one; and ``document_encoding=bag_of_words``, the documents' own terms, for which no model
runs while the index is built, and whose best hundred can be re-ranked with term weights (``rerank=100``).

`VDR.encode` and `VDR.score_documents` are the algorithm in NumPy. Encoders are in `retrieval.encoders.vdr`; the
inverted lists and their exact search, which skips blocks of documents, are in `retrieval.sparse_index`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, ScoreExplanation, TermWeights
from .hookspecs import Register, hookimpl
from .inverted_index_kind import InvertedIndexKind, explain_shared_terms

if TYPE_CHECKING:
    from ..retrieval.encoders.vdr import VocabularyEncoder
    from ..retrieval.sparse_index import InvertedIndexSearcher
    from ..retrieval.sparse_vectors import SparseVectors

NUM_SHOWN_TERMS = 30


@dataclass(frozen=True)
class VDROptions:
    """Options of VDR, fixed when an index is built.

    Attributes:
        document_encoding: ``weights`` from the encoder, or ``bag_of_words``, for which no model runs.
        activation: ``elu1p`` (VDR), ``splade``, or ``auto`` for that of the checkpoint.
        top: Number of largest term weights kept of a text, in addition to those of its own terms; 0 for all.
        bits: Bits of a quantised impact: 8 or 16.
    """

    document_encoding: Literal["weights", "bag_of_words"] = "weights"
    activation: Literal["auto", "elu1p", "splade"] = "auto"
    top: int = 768
    bits: Literal[8, 16] = 8

    def __post_init__(self) -> None:
        if not 0 <= self.top <= 1 << 20:
            raise ValueError(f"top: expected 0 to {1 << 20}, got {self.top}")


@dataclass(frozen=True)
class VDRSettings:
    """Search settings of VDR.

    Attributes:
        query_encoding: ``weights`` from the encoder, or ``bag_of_words``: the query's own terms with weight one, for
            which no model runs.
        rerank: Rerank depth: number of best documents that are encoded and scored again; for an index with
            ``document_encoding=bag_of_words``.
        exhaustive: Whether no block of documents is skipped; the result is the same.
        term_boosts: Terms and factors by which their weights are multiplied; 0 bans a term. A term that the query lacks
            is added with the factor times the mean weight of the query's own terms.
    """

    query_encoding: Literal["weights", "bag_of_words"] = "weights"
    rerank: int = 0
    exhaustive: bool = False
    term_boosts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.rerank <= 10_000:
            raise ValueError(f"rerank: expected 0 to 10000, got {self.rerank}")
        if not isinstance(self.term_boosts, Mapping):
            raise ValueError('term_boosts: expected terms and factors, {"shark": 2, "sea": 0}')
        for word, factor in self.term_boosts.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1e6:
                raise ValueError(f"term_boosts: expected a factor from 0 on for {word!r}, got {factor!r}")


class VDR(InvertedIndexKind):
    """Learned sparse search over inverted lists."""

    name: ClassVar[str] = "vdr"
    default_encoder: ClassVar[str] = "splade-tiny"
    Options: ClassVar[type] = VDROptions
    Settings: ClassVar[type] = VDRSettings

    def __init__(self, options: VDROptions) -> None:
        self.options = options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """Load a sparse encoder: ``splade-tiny``, or the folder of a checkpoint."""
        from ..retrieval.encoders import vdr

        o = self.options
        return vdr.load_vocabulary_encoder(
            name, device, precision, o.activation, o.top, o.document_encoding == "bag_of_words"
        )

    def train(self, encoded: "SparseVectors", expected: int) -> Arrays:
        """Train the quantisation step of impacts."""
        from ..retrieval import sparse_index

        del expected
        trained = np.array([len(encoded)], np.int64)
        weights = np.ones(1, np.float32) if self.options.document_encoding == "bag_of_words" else encoded.values
        return {**sparse_index.train_impacts(weights, self.options.bits), "trained": trained}

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """Return whether impacts should be quantised again: larger weights than the first documents had are clipped."""
        return self.options.document_encoding == "weights" and super().needs_retraining(shared, documents)

    def segment(self, encoded: "SparseVectors", numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Build inverted lists."""
        from ..retrieval import sparse_index

        arrays = sparse_index.build_sparse_segment(encoded, numbers, shared, self.options.bits)
        return len(arrays["places"]), arrays

    def queries(self, encoder: Any, texts: Sequence[str], settings: VDRSettings) -> "SparseVectors":
        """Encode queries, and apply ``term_boosts``."""
        from ..retrieval.sparse_vectors import SparseVectors

        if settings.query_encoding == "weights":
            encoded = encoder.encode_queries(texts)
        elif hasattr(encoder, "bags_of_words"):
            encoded = encoder.bags_of_words(texts)
        else:  # a third-party encoder without bags of words
            encoded = encoder.encode_queries(texts).bag_of_words()
        if not settings.term_boosts:
            return encoded
        return SparseVectors.concatenate(
            [apply_term_boosts(encoded[i], settings.term_boosts, encoder) for i in range(len(encoded))]
        )

    def search(
        self,
        searcher: "InvertedIndexSearcher",
        query: "SparseVectors",
        k: int,
        settings: VDRSettings,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the documents of largest inner product."""
        return searcher.search(query, k, allow, settings.exhaustive)

    @staticmethod
    def encode(logits: NDArray, token_ids: Sequence[int], top: int) -> NDArray[np.float64]:
        """Compute the lexical representation of one text (section 3.1).

        Args:
            logits: [tokens, vocabulary] logits of the encoder.
            token_ids: Vocabulary ids of the text's own terms, which are always kept.
            top: Number of largest weights that are kept.

        Returns:
            [vocabulary] term weights; 0 for terms that are not kept.
        """
        logits = logits.astype(np.float64)
        # elu1p: elu(z) + 1, which is positive everywhere.
        activated = np.where(logits > 0, logits + 1, np.exp(np.minimum(logits, 0)))
        # Max pooling over tokens.
        weights = activated.max(0)
        # Top-k sparsification, united with the bag-of-words mask.
        kept = np.zeros(len(weights), bool)
        kept[np.argsort(-weights, kind="stable")[:top]] = True
        kept[list(token_ids)] = True
        return np.where(kept, weights, 0.0)

    @staticmethod
    def score_documents(query: NDArray, documents: NDArray) -> NDArray[np.float64]:
        """Return the inner products of a query [vocabulary] with documents [documents, vocabulary]."""
        return documents.astype(np.float64) @ query.astype(np.float64)

    def rescored(self, settings: VDRSettings) -> int:
        """Return the rerank depth."""
        return settings.rerank

    def rescore(
        self, encoder: Any, query: "SparseVectors", texts: Sequence[str], settings: VDRSettings
    ) -> NDArray[np.float32]:
        """Return inner products with term weights that the encoder computes now."""
        del settings
        return _able(encoder, "score")(query, texts)

    def explain(
        self,
        searcher: "InvertedIndexSearcher",
        encoder: Any,
        query: str,
        text: str,
        number: int,
        settings: VDRSettings,
        allow: Any,
    ) -> list[ScoreExplanation]:
        """Return the terms that query and document share, and the contribution of each to the score."""
        del text, allow
        encoded = self.queries(encoder, [query], settings)
        return explain_shared_terms(searcher, encoded, number, _able(encoder, "term"))

    def term_weights(self, encoder: Any, query: str, text: str, settings: VDRSettings) -> TermWeights | None:
        """Return the terms of largest weight of both texts; None where the encoder has no names for terms."""
        if not hasattr(encoder, "term"):
            return None
        both = self.queries(encoder, [query], settings), encoder.encode_documents([text])
        return TermWeights(*(_heaviest(words, encoder) for words in both))


def apply_term_boosts(
    query: "SparseVectors", factors: Mapping[str, float], encoder: "VocabularyEncoder"
) -> "SparseVectors":
    """Return a query whose term weights are changed by ``factors``; see `VDRSettings.term_boosts`.

    Raises:
        RetrievalError: A term is not in the vocabulary.
    """
    from ..retrieval.errors import RetrievalError
    from ..retrieval.sparse_vectors import SparseVectors

    weights = dict(zip(query.indices.tolist(), query.values.tolist(), strict=True))
    in_text = query.values[query.in_text]
    usual = float(in_text.mean()) if len(in_text) else 1.0
    for word, factor in factors.items():
        numbers = _able(encoder, "term_ids")(word)
        if not numbers:
            raise RetrievalError(f"term_boosts: {word!r} is not in the encoder's vocabulary")
        for number in numbers:
            weights[number] = weights.get(number, usual) * factor
    return SparseVectors.from_dicts([{i: w for i, w in weights.items() if w > 0}])


def _able(encoder: Any, method: str) -> Any:
    """Return an optional method of an encoder.

    Raises:
        RetrievalError: The encoder lacks it.
    """
    from ..retrieval.errors import RetrievalError

    if (function := getattr(encoder, method, None)) is None:
        raise RetrievalError(f"encoder {encoder.name}: lacks the method `{method}`, which is needed here")
    return function


def _heaviest(words: "SparseVectors", encoder: "VocabularyEncoder") -> list[tuple[str, float]]:
    order = np.argsort(-words.values, kind="stable")[:NUM_SHOWN_TERMS].tolist()
    return [(encoder.term(int(words.indices[i])), float(words.values[i])) for i in order]


@hookimpl
def register_indexes(register: Register) -> None:
    """Register the index type."""
    register(VDR)
