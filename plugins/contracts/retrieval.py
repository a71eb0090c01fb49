"""The contracts of index types and encoders.

An `Encoder` turns texts into vectors or term weights. An `IndexKind` turns these into arrays, segment by segment, and
searches them. `retrieval.Index` does everything else: documents, metadata, filters, deletion and commits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import NoOptions, Plugin

Arrays = Mapping[str, NDArray]


class IndexKind(Plugin, ABC):
    """Base class of index types.

    An index type handles internal doc ids, which are assigned in ascending order and never reused, and named arrays,
    which are stored in files and memory-mapped. The arrays of an index are those of its segments, and the *shared*
    arrays, which `train` computes from the first documents and all segments use.

    Attributes:
        default_encoder: Name of the encoder that is used if the user names none.
        Settings: Frozen dataclass of the search settings. In contrast to ``Options``, which are fixed when an index is
            built, settings can be changed at any time.
        divisible: Whether the score of a document is the same in any shard, so that an index can be sharded.
    """

    default_encoder: ClassVar[str]
    Settings: ClassVar[type] = NoOptions
    divisible: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, options: Any) -> None: ...

    @abstractmethod
    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> "Encoder":
        """Load one of the index type's own encoders; called for names that no plugin has registered.

        Args:
            name: Name of the encoder, or a folder with its checkpoint.
            device: Device of the model; ``auto`` for a GPU if there is one.
            precision: Dtype of the model.

        Raises:
            RetrievalError: There is no such encoder.
        """

    @abstractmethod
    def train(self, encoded: Any, expected: int) -> Arrays:
        """Return the shared arrays; called before the first segment is built, and when the index is retrained.

        Args:
            encoded: Output of `Encoder.encode_documents` for the first documents.
            expected: Number of documents that the index is expected to have.
        """

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """Return whether the index has grown so much since `train` that it should be retrained.

        Args:
            shared: Shared arrays.
            documents: Number of documents in the index.
        """
        del shared, documents
        return False

    @abstractmethod
    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Build a segment.

        Args:
            encoded: Output of `Encoder.encode_documents`.
            numbers: [num_documents] internal doc ids.
            shared: Shared arrays.

        Returns:
            The number of postings, and the arrays of the segment. One of them is ``documents``, which contains the
            internal id of every document at least once.
        """

    @abstractmethod
    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Merge segments into one, without deleted documents.

        Args:
            segments: Arrays of each segment.
            live: [num_ids] whether the document with this internal id exists.

        Returns:
            The number of postings, and the arrays of the merged segment, as from `segment`.
        """

    @abstractmethod
    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> Any:
        """Return an object with which `search` searches a commit; called once for each commit.

        Args:
            shared: Shared arrays.
            segments: Arrays of each segment.
            documents: Upper bound of the internal doc ids.

        Raises:
            ValueError: The arrays do not fit each other.
        """

    @abstractmethod
    def search(
        self, searcher: Any, query: Any, k: int, settings: Any, allow: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Search for the best documents; may be called from several threads at the same time.

        Args:
            searcher: Return value of `searcher`.
            query: One query, an item of the return value of `queries`.
            k: Largest number of documents to return.
            settings: Instance of ``Settings``.
            allow: [ceil(documents / 8)] bitmap of the internal doc ids that may be returned, least significant bit
                first; None for all.

        Returns:
            [n] internal doc ids and [n] scores of at most ``k`` documents, best first.
        """

    def queries(self, encoder: "Encoder", texts: Sequence[str], settings: Any) -> Any:
        """Encode queries for `search`.

        Args:
            encoder: Encoder of the index.
            texts: Texts of the queries.
            settings: Instance of ``Settings``.

        Returns:
            An object whose item ``i`` is the encoded query ``i``.
        """
        del settings
        return encoder.encode_queries(texts)

    def rescored(self, settings: Any) -> int:
        """Return the rerank depth: how many of the best documents `rescore` re-ranks by their texts; 0 for none."""
        del settings
        return 0

    def rescore(self, encoder: "Encoder", query: Any, texts: Sequence[str], settings: Any) -> NDArray[np.float32]:
        """Compute new scores from the texts of documents; called if `rescored` is not 0.

        Args:
            encoder: Encoder of the index.
            query: One query, an item of the return value of `queries`.
            texts: Texts of the documents.
            settings: Instance of ``Settings``.

        Returns:
            [num_texts] scores.

        Raises:
            NotImplementedError: The index type overrides `rescored`, but not this method.
        """
        raise NotImplementedError(f"{self.name}: `rescored` is not 0, but `rescore` is not implemented")

    def wider(self, settings: Any, searcher: Any) -> Any | None:
        """Return settings that search a larger part of the index; None if the whole index was searched.

        Called when a search with a filter returns too few documents.
        """
        del settings, searcher
        return None

    def explain(
        self, searcher: Any, encoder: "Encoder", query: str, text: str, number: int, settings: Any, allow: Any
    ) -> "list[ScoreExplanation]":
        """Explain the score of a document; an empty list for no explanation.

        Args:
            searcher: Return value of `searcher`.
            encoder: Encoder of the index.
            query: Text of the query.
            text: Text of the document.
            number: Internal id of the document.
            settings: Instance of ``Settings``.
            allow: Bitmap of the filter, as for `search`.
        """
        del searcher, encoder, query, text, number, settings, allow
        return []

    def term_weights(self, encoder: "Encoder", query: str, text: str, settings: Any) -> "TermWeights | None":
        """Return the term weights of a query and of a document; None if the index type does not use terms."""
        del encoder, query, text, settings
        return None


@dataclass(frozen=True)
class TermWeights:
    """The term weights of a query and of a document, largest weight first.

    Attributes:
        query: Terms of the query and their weights.
        document: Terms of the document and their weights.
    """

    query: list[tuple[str, float]]
    document: list[tuple[str, float]]


@dataclass(frozen=True)
class ScoreExplanation:
    """One addend of a document's score.

    Attributes:
        query: Token or term of the query.
        document: Token or term of the document that it matches; None for no match.
        score: The addend.
        imputed: Whether the addend is an estimate for a token or document that was not retrieved.
        position: Position of ``document`` among the document's tokens; None if it is not a token.
    """

    query: str
    document: str | None
    score: float
    imputed: bool = False
    position: int | None = None


class Encoder(Plugin, ABC):
    """Base class of encoders, which turn texts into token vectors, document vectors or term weights.

    The encoded queries and documents have a length, the number of texts.

    Attributes:
        dimension: Dimension of the vectors, or size of the vocabulary.
    """

    dimension: int

    @abstractmethod
    def __init__(self, options: Any, device: str = "auto", precision: str = "float32") -> None: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Fingerprint of the encoder's files.

        An index can only be used with an encoder that has the same fingerprint as the one it was built with.
        """

    @abstractmethod
    def encode_queries(self, texts: Sequence[str]) -> Any:
        """Encode queries."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Any:
        """Encode documents.

        Args:
            texts: Texts of the documents.
            progress: Function that is called with the number of texts encoded since its last call.
        """

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Split a text into chunks; called if the user asks for chunks of a size.

        This implementation counts words instead of tokens.

        Args:
            text: Text to split.
            size: Approximate number of tokens in a chunk.
            overlap: Number of tokens that a chunk repeats from the chunk before it.
        """
        words = text.split()
        begins = range(0, max(len(words) - overlap, 1), size - overlap)
        return [" ".join(words[b : b + size]) for b in begins] if len(words) > size else [text]
