"""What a plugin promises to whoever calls it: one abstract class for each kind, and the values that cross the border.

Token ids are ``int32``, probabilities ``float32``. ``n`` is a number of tokens, ``k`` of candidates per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..kvcache.head_window import HeadPlan
    from ..kvcache.selection import ReadPlan

Int32 = NDArray[np.int32]
Arrays = Mapping[str, NDArray]
Float32 = NDArray[np.float32]

ROOT = -1  # the parent of a node that follows the last accepted token directly


class Unsupported(ValueError):  # noqa: N818 -- the name of the design
    """A selected plugin cannot serve this engine; the message names plugin, model, layer, reason and remedy."""

    def __init__(self, plugin: str, reason: str, remedy: str, model: str = "any", layer: str = "any") -> None:
        self.plugin, self.model, self.layer, self.reason, self.remedy = plugin, model, layer, reason, remedy
        where = f"model {model}" + ("" if layer == "any" else f", layer {layer}")
        super().__init__(f"{plugin} does not support {where}: {reason}; {remedy}")


@dataclass(frozen=True)
class Engine:
    """The facts about an engine on which support depends."""

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_speculative_tokens: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    layers: int = 0
    kv_heads: int = 0  # of a layer, on all ranks together
    fingerprint: str = ""  # of the model's shape, see `kvcache.profiles`; empty when it is not known yet


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


class Plugin:
    """What every registered class has: a name, and a frozen dataclass of options."""

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions

    @classmethod
    def check(cls, options: Any, engine: Engine) -> None:
        """Raise `Unsupported` when ``options`` cannot be served on ``engine``; called before anything starts."""


# --------------------------------------------------------------------------------------------------- drafters


@dataclass(frozen=True)
class DraftTree:
    """Tokens that may follow the last accepted one; a chain is a tree with one leaf.

    Attributes:
        tokens: [n] token ids, parents before their children.
        parents: [n] index of the parent in ``tokens``, `ROOT` for children of the last accepted token.
        scores: [n] estimated probability that the node is accepted, never above its parent's.
    """

    tokens: Int32
    parents: Int32
    scores: Float32

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if len(self.parents) != n or len(self.scores) != n:
            raise ValueError(f"{n} tokens, {len(self.parents)} parents and {len(self.scores)} scores")
        if n and not (self.parents < np.arange(n)).all():
            raise ValueError("a parent stands after its child")
        if n and self.parents.min() < ROOT:
            raise ValueError(f"parent {self.parents.min()} is below {ROOT}")

    def __len__(self) -> int:
        return len(self.tokens)

    def best_path(self) -> Int32:
        """Nodes of the root-to-leaf path with the most expected accepted tokens (the sum of its scores), [depth]."""
        if not len(self):
            return np.empty(0, np.int32)
        value = self.scores.astype(np.float64)
        for node, parent in enumerate(self.parents.tolist()):
            if parent != ROOT:
                value[node] += value[parent]
        path = [int(value.argmax())]
        while self.parents[path[-1]] != ROOT:
            path.append(int(self.parents[path[-1]]))
        return np.array(path[::-1], np.int32)


@dataclass(frozen=True)
class Candidates:
    """What the target model thought at every position that one step verified for a request.

    Row 0 is the last token accepted before the step; the others are drafted tokens, in the order of their tree.

    Attributes:
        context: [m] tokens before row 0, the latest last; may be a short tail of the text.
        inputs: [n] the token at each row.
        parents: [n] the row that each row follows; `ROOT` for row 0.
        ids: [n, k] the model's most probable next tokens at each row, best first; -1 where there is none.
        probs: [n, k] their probabilities among the k.
    """

    context: Int32
    inputs: Int32
    parents: Int32
    ids: Int32
    probs: Float32


@dataclass(frozen=True)
class DraftRequest:
    """A request that wants a draft.

    Attributes:
        id: Its name.
        tokens: [t] token ids of its text so far, the root last.
        limit: How many tokens it can take.
        drafted: [d] what a draft model that the engine runs proposed; empty where there is none.
    """

    id: str
    tokens: Int32
    limit: int
    drafted: Int32 = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True)
class DraftBudget:
    """The largest tree worth proposing for one request."""

    nodes: int
    depth: int


class Drafter(Plugin, ABC):
    """Guesses the next tokens of requests. It never changes the output distribution: the engine verifies each guess."""

    default_depth: ClassVar[int] = 8  # longest path that is drafted when the user names no number
    default_nodes: ClassVar[int] = 64  # and, where trees are verified, most nodes
    candidates: int = 8  # how many of the model's next tokens `observe` is shown
    state_path: str | None = None  # where `save` and `load` keep the state between runs, if anywhere
    whole: bool = False  # its trees have a size of their own: the engine verifies all of what it proposes

    @classmethod
    def needs_draft_model(cls, options: Any) -> bool:
        """Whether requests have to bring what a draft model proposed, which the engine then runs."""
        del options
        return False

    @classmethod
    def tokenizer(cls, options: Any) -> tuple[str, str] | None:
        """Fingerprint of the tokenizer whose ids it was given, see `retrieval.datastore.fingerprint`, and where."""
        del options
        return None

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    @abstractmethod
    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Begin a request; ``prompt`` is [t] token ids."""

    @abstractmethod
    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Learn from a step: ``tokens`` [a] were accepted or sampled (none while a prompt is still processed)."""

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """A tree for each request, at most ``budget`` and the request's limit large; an empty one for no draft."""

    @abstractmethod
    def finish(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""

    def save(self, path: Path) -> None:
        """Write the learned state atomically."""

    def load(self, path: Path) -> None:
        """Read the state that `save` wrote; raises `ValueError` when it belongs to another model or version."""

    def stats(self) -> dict[str, float]:
        """Figures for reports: sizes, counts."""
        return {}


# ----------------------------------------------------------------------------------- the other kinds of plugin


class KVPolicy(Plugin, ABC):
    """Which keys and values a layer reads, or keeps. With a budget that covers the context it is stock attention.

    A policy has one of two plans; the other is None.
    """

    frees_blocks: ClassVar[bool] = False  # by a `head_plan`; there is no prefix caching then

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    def read_plan(self) -> "ReadPlan | None":
        """What every layer reads in a decode step; everything stays in memory."""
        return None

    def head_plan(self) -> "HeadPlan | None":
        """Which heads keep everything; what the others drop is free memory."""
        return None


@dataclass(frozen=True)
class ImageLayout:
    """The views into which a picture is cut: rows x columns of patches, the overview first."""

    views: tuple[tuple[int, int], ...]
    params: Mapping[str, Any] = field(default_factory=dict)


class VisualPruner(Plugin, ABC):
    """Drops visual tokens; it keeps exactly the number it announced."""

    @abstractmethod
    def kept_tokens(self, layout: ImageLayout) -> int:
        """How many tokens a picture of this layout keeps, known before the encoder runs."""

    @abstractmethod
    def select(self, features: Any, attention: Any, layout: ImageLayout) -> Any:
        """Indices of the tokens that stay, as many as `kept_tokens` announced."""


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

    def outgrown(self, shared: Arrays, documents: int) -> bool:
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
        """Scores of documents by their texts; ``query`` is one of `queries`."""
        raise NotImplementedError

    def wider(self, settings: Any, searcher: Any) -> Any | None:
        """Settings that look further, for a filter that lets few documents pass; None where all was looked at."""
        del settings, searcher
        return None

    def explain(
        self, searcher: Any, encoder: "Encoder", query: str, text: str, number: int, settings: Any, allow: Any
    ) -> "list[Reason]":
        """Why a document has its score."""
        del searcher, encoder, query, text, number, settings, allow
        return []

    def reading(self, encoder: "Encoder", query: str, text: str, settings: Any) -> "Reading | None":
        """A query and a document in words, where that is what they are made of."""
        del encoder, query, text, settings
        return None


@dataclass(frozen=True)
class Reading:
    """Weighted words of a query and of a document, the heaviest first."""

    query: list[tuple[str, float]]
    document: list[tuple[str, float]]


@dataclass(frozen=True)
class Reason:
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
