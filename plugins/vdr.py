"""VDR, vocabulary disentangled retrieval (ICLR 2024): a text is weights over words, found by an inverted index.

    score(query, document) = the inner product of their weights

The three forms of the paper's code: both sides weighted (the default); ``query_encoding=bag_of_words``, a query's own words against
weighted documents; and an index of ``document_encoding=bag_of_words``, weighted queries against documents' own words, which needs no
model to be built, and whose best hundred can be scored once more with weights (``rerank=100``). Weights are made by
`retrieval.encoders.vdr`; the arrays and their search are in `retrieval.sparse_index`.
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

SHOWN = 30  # words of a text that people are shown


@dataclass(frozen=True)
class VDROptions:
    """Options of VDR, fixed when an index is made.

    Attributes:
        document_encoding: `weights` of an encoder, or their own `words` alone, for which no model runs.
        activation: `elu1p` (VDR), `splade`, or `auto` for what the checkpoint was trained with.
        top: Weights kept of a text beside those of its own words; 0 for all.
        bits: Of an impact: 8 or 16.
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
    """How a VDR index is searched.

    Attributes:
        query_encoding: Of the query: `weights` of the encoder, or its own `words` with weight one, for which no model runs.
        rerank: So many of the best are encoded and scored anew; of use with `document_encoding=bag_of_words`.
        exhaustive: Skip no block of documents; the answer is the same.
        term_boosts: Words and factors: their weights times that, 0 to ban one. A word that the query lacks is added with the
            factor times the mean weight of the query's own words.
    """

    query_encoding: Literal["weights", "bag_of_words"] = "weights"
    rerank: int = 0
    exhaustive: bool = False
    term_boosts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.rerank <= 10_000:
            raise ValueError(f"rerank: expected 0 to 10000, got {self.rerank}")
        if not isinstance(self.term_boosts, Mapping):
            raise ValueError('term_boosts: expected words and factors, {"shark": 2, "sea": 0}')
        for word, factor in self.term_boosts.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1e6:
                raise ValueError(f"term_boosts: expected a factor from 0 on for {word!r}, got {factor!r}")


class VDR(InvertedIndexKind):
    """Words of a vocabulary; see the module."""

    name: ClassVar[str] = "vdr"
    default_encoder: ClassVar[str] = "splade-tiny"
    Options: ClassVar[type] = VDROptions
    Settings: ClassVar[type] = VDRSettings

    def __init__(self, options: VDROptions) -> None:
        self.options = options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """An encoder of words: ``splade-tiny``, or the folder of a checkpoint."""
        from ..retrieval.encoders import vdr

        o = self.options
        return vdr.load_vocabulary_encoder(
            name, device, precision, o.activation, o.top, o.document_encoding == "bag_of_words"
        )

    def train(self, encoded: "SparseVectors", expected: int) -> Arrays:
        """What an impact is worth."""
        from ..retrieval import sparse_index

        del expected
        trained = np.array([len(encoded)], np.int64)
        weights = np.ones(1, np.float32) if self.options.document_encoding == "bag_of_words" else encoded.values
        return {**sparse_index.train_impacts(weights, self.options.bits), "trained": trained}

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """While they are few, when they double: greater weights than the first ones had would be cut."""
        return self.options.document_encoding == "weights" and super().needs_retraining(shared, documents)

    def segment(self, encoded: "SparseVectors", numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Inverted lists."""
        from ..retrieval import sparse_index

        made = sparse_index.build_sparse_segment(encoded, numbers, shared, self.options.bits)
        return len(made["places"]), made

    def queries(self, encoder: Any, texts: Sequence[str], settings: VDRSettings) -> "SparseVectors":
        """Weighted words, edited."""
        from ..retrieval.sparse_vectors import SparseVectors

        if settings.query_encoding == "weights":
            found = encoder.encode_queries(texts)
        elif hasattr(encoder, "bags"):
            found = encoder.bags(texts)
        else:  # somebody else's, with weights alone
            found = encoder.encode_queries(texts).bag()
        if not settings.term_boosts:
            return found
        return SparseVectors.concatenate(
            [apply_term_edits(found[i], settings.term_boosts, encoder) for i in range(len(found))]
        )

    def search(
        self,
        searcher: "InvertedIndexSearcher",
        query: "SparseVectors",
        k: int,
        settings: VDRSettings,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The greatest inner products."""
        return searcher.search(query, k, allow, settings.exhaustive)

    def rescored(self, settings: VDRSettings) -> int:
        """``rerank``."""
        return settings.rerank

    def rescore(
        self, encoder: Any, query: "SparseVectors", texts: Sequence[str], settings: VDRSettings
    ) -> NDArray[np.float32]:
        """Inner products with weights that are made now."""
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
        """The words that query and document share, and what each adds."""
        del text, allow
        mine = self.queries(encoder, [query], settings)
        return explain_shared_terms(searcher, mine, number, _able(encoder, "word"))

    def term_weights(self, encoder: Any, query: str, text: str, settings: VDRSettings) -> TermWeights | None:
        """The heaviest words of both; None where the encoder has no names for words."""
        if not hasattr(encoder, "word"):
            return None
        both = self.queries(encoder, [query], settings), encoder.encode_documents([text])
        return TermWeights(*(_heaviest(words, encoder) for words in both))


def apply_term_edits(
    query: "SparseVectors", factors: Mapping[str, float], encoder: "VocabularyEncoder"
) -> "SparseVectors":
    """A query with the weights of some words changed; see `VDRSettings.term_boosts`.

    Raises:
        RetrievalError: the vocabulary has no such word.
    """
    from ..retrieval.errors import RetrievalError
    from ..retrieval.sparse_vectors import SparseVectors

    weights = dict(zip(query.indices.tolist(), query.values.tolist(), strict=True))
    own = query.values[query.in_text]
    usual = float(own.mean()) if len(own) else 1.0
    for word, factor in factors.items():
        numbers = _able(encoder, "numbers")(word)
        if not numbers:
            raise RetrievalError(f"term_boosts: {word!r} is not in the encoder's vocabulary")
        for number in numbers:
            weights[number] = weights.get(number, usual) * factor
    return SparseVectors.from_dicts([{i: w for i, w in weights.items() if w > 0}])


def _able(encoder: Any, method: str) -> Any:
    """A method that encoders of words have, and others may lack.

    Raises:
        RetrievalError: this one does.
    """
    from ..retrieval.errors import RetrievalError

    if (found := getattr(encoder, method, None)) is None:
        raise RetrievalError(f"encoder {encoder.name}: has no `{method}`, which this needs")
    return found


def _heaviest(words: "SparseVectors", encoder: "VocabularyEncoder") -> list[tuple[str, float]]:
    order = np.argsort(-words.values, kind="stable")[:SHOWN].tolist()
    return [(encoder.term(int(words.indices[i])), float(words.values[i])) for i in order]


@hookimpl
def register_indexes(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(VDR)
