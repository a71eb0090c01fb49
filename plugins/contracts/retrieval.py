"""Kinds of indexes, and encoders of texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import NoOptions, Plugin

Arrays = Mapping[str, NDArray]


class IndexKind(Plugin, ABC):
    """How documents become arrays and how those are searched; `retrieval.Index` does the rest.

    Ids, texts, metadata, filters, deletion, commits and crashes are the store's business. A kind sees internal numbers
    of documents, which only ever grow, and arrays by name, which are mapped from files.
    """

    default_encoder: ClassVar[str]
    Settings: ClassVar[type] = NoOptions  # frozen dataclass: how an index is searched, may change after it was built
    divisible: ClassVar[bool] = True  # whether a document's score is the same in any shard

    @abstractmethod
    def __init__(self, options: Any) -> None: ...

    @abstractmethod
    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> "Encoder":
        """The kind's own encoder of that name, or in that folder; registered ones were looked for before.

        Raises:
            RetrievalError: there is none.
        """

    @abstractmethod
    def train(self, encoded: Any, expected: int) -> Arrays:
        """What all segments share, from the first of ``expected`` documents."""

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """Whether so many documents are so many more than `train` saw that it should see them."""
        del shared, documents
        return False

    @abstractmethod
    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Postings of documents with these internal numbers, and how many they are.

        Among the arrays is ``documents``: every number that there is, once or more often.
        """

    @abstractmethod
    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """One segment of several, without the documents that are not ``live``."""

    @abstractmethod
    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> Any:
        """What `search` needs of one snapshot; made once for it.

        Raises:
            ValueError: the arrays do not fit each other.
        """

    @abstractmethod
    def search(
        self, searcher: Any, query: Any, k: int, settings: Any, allow: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Internal numbers and scores, best first, of at most ``k`` documents whose bit is set in ``allow``."""

    def queries(self, encoder: "Encoder", texts: Sequence[str], settings: Any) -> Any:
        """What `search` takes for some queries: as many as there are texts, by their places."""
        del settings
        return encoder.encode_queries(texts)

    def rescored(self, settings: Any) -> int:
        """So many of the best are scored once more, from their texts, by `rescore`."""
        del settings
        return 0

    def rescore(self, encoder: "Encoder", query: Any, texts: Sequence[str], settings: Any) -> NDArray[np.float32]:
        """Scores of documents by their texts; ``query`` is one of `queries`. Of kinds for which `rescored` is not 0.

        Raises:
            NotImplementedError: the kind asks for it, and has none.
        """
        raise NotImplementedError(f"{self.name}: `rescored` asks for `rescore`, which is not there")

    def wider(self, settings: Any, searcher: Any) -> Any | None:
        """Settings that look further, for a filter that lets few documents pass; None where all was looked at."""
        del settings, searcher
        return None

    def explain(
        self, searcher: Any, encoder: "Encoder", query: str, text: str, number: int, settings: Any, allow: Any
    ) -> "list[ScoreExplanation]":
        """Why a document has its score."""
        del searcher, encoder, query, text, number, settings, allow
        return []

    def term_weights(self, encoder: "Encoder", query: str, text: str, settings: Any) -> "TermWeights | None":
        """A query and a document in words, where that is what they are made of."""
        del encoder, query, text, settings
        return None


@dataclass(frozen=True)
class TermWeights:
    """Weighted words of a query and of a document, the heaviest first."""

    query: list[tuple[str, float]]
    document: list[tuple[str, float]]


@dataclass(frozen=True)
class ScoreExplanation:
    """A part of a score.

    Attributes:
        query: Of the query: the token or word.
        document: Of the document: what it met; None where nothing.
        score: What it adds.
        imputed: Whether that stands for something that was not retrieved.
        position: Of ``document`` among the document's tokens.
    """

    query: str
    document: str | None
    score: float
    imputed: bool = False
    position: int | None = None


class Encoder(Plugin, ABC):
    """Turns texts into what a kind of index keeps: vectors of tokens, weights of words.

    What it returns has a length, the number of texts.
    """

    dimension: int

    @abstractmethod
    def __init__(self, options: Any, device: str = "auto", precision: str = "float32") -> None: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of its files: what two encoders of different fingerprints make does not go together."""

    @abstractmethod
    def encode_queries(self, texts: Sequence[str]) -> Any:
        """What queries are."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Any:
        """What documents are; ``progress`` is told how many texts were encoded since it was told last."""

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Pieces of a text of about ``size`` tokens, each with ``overlap`` of the one before; here, of words."""
        words = text.split()
        begins = range(0, max(len(words) - overlap, 1), size - overlap)
        return [" ".join(words[b : b + size]) for b in begins] if len(words) > size else [text]
