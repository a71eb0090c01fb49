"""A hybrid of several index types in one folder, whose rankings are fused.

    rrf    reciprocal-rank fusion (SIGIR 2009): sum over members of weight / (constant + rank)
    score  sum over members of weight * (score - lowest) / (highest - lowest), over the documents that the member found

Each member has its own arrays, whose names begin with the member's name. Documents, filters, deletion and commits are
shared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .config import ConfigError, Selection, build_options
from .contracts import Arrays, IndexKind, ScoreExplanation, TermWeights
from .hookspecs import Register, hookimpl
from .manager import plugins

MAX_WEIGHT = 1e6  # largest weight of a member
BETWEEN = "."  # separates the names of a member and its array


@dataclass(frozen=True)
class HybridOptions:
    """Options of a hybrid, fixed when an index is built.

    Attributes:
        members: Names of two or more index types, separated by ``+``.
        options: Options of members, by name of the member.
    """

    members: str = "xtr+vdr+bm25+dense"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.members.split("+")
        if len(set(names)) < len(names) or len(names) < 2 or "hybrid" in names:
            raise ValueError(
                f"members: expected two or more index types other than hybrid, each once, got {self.members!r}"
            )
        if stray := sorted(set(self.options) - set(names)):
            raise ValueError(f"options: {stray[0]!r} is none of the members {', '.join(names)}")
        for name in names:
            plugins().resolve("index", Selection(name, dict(self.options.get(name, {}))))


@dataclass(frozen=True)
class HybridSettings:
    """Search settings of a hybrid.

    Attributes:
        fusion: ``score`` for a weighted sum of normalised scores, ``rrf`` for reciprocal-rank fusion.
        constant: Constant of reciprocal-rank fusion: the larger, the smaller the difference between the first ranks.
        depth: Number of documents that each member finds.
        weights: Weights of members, by name of the member; 1 by default, 0 disables a member.
        settings: Search settings of members, by name of the member.
    """

    fusion: Literal["rrf", "score"] = "score"
    constant: int = 60
    depth: int = 100
    weights: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (("constant", 1, 10_000), ("depth", 1, 10_000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {getattr(self, name)}")
        if any(not 0 <= w <= MAX_WEIGHT for w in self.weights.values()):
            raise ValueError(f"weights: expected 0 to {MAX_WEIGHT:g}, got {dict(self.weights)}")


@dataclass(frozen=True)
class HybridSearcher:
    """Searchers of the members.

    Attributes:
        parts: Searcher of each member, by name of the member.
        documents: Upper bound of the internal doc ids.
    """

    parts: Mapping[str, Any]
    documents: int


class Hybrid(IndexKind):
    """Fusion of the rankings of several index types."""

    name: ClassVar[str] = "hybrid"
    default_encoder: ClassVar[str] = "default"
    divisible: ClassVar[bool] = False
    Options: ClassVar[type] = HybridOptions
    Settings: ClassVar[type] = HybridSettings

    def __init__(self, options: HybridOptions) -> None:
        self.members: dict[str, Any] = {}
        for name in options.members.split("+"):
            cls, parsed = plugins().resolve("index", Selection(name, dict(options.options.get(name, {}))))
            self.members[name] = cls(parsed)

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """Load the encoders of the members.

        Args:
            name: ``default`` for the default encoder of each member, or encoders for some members, such as
                ``xtr=FOLDER,vdr=FOLDER``.
            device: Device of the models; ``auto`` for a GPU if there is one.
            precision: Dtype of the models.

        Raises:
            RetrievalError: A member or an encoder does not exist.
        """
        from ..retrieval.encoders.multi_encoder import MultiEncoder
        from ..retrieval.errors import RetrievalError
        from ..retrieval.registry import resolve_encoder

        names = {m: kind.default_encoder for m, kind in self.members.items()}
        if name != self.default_encoder:
            for part in name.split(","):
                member, _, encoder = part.partition("=")
                if member not in names or not encoder:
                    raise RetrievalError(f"encoder {part}: expected MEMBER=ENCODER with a member of {', '.join(names)}")
                names[member] = encoder
        encoders = {m: resolve_encoder(self.members[m], encoder, device, precision) for m, encoder in names.items()}
        return MultiEncoder(encoders)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """Train each member."""
        return _joined({m: kind.train(encoded.parts[m], expected) for m, kind in self.members.items()})

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """Return whether any member needs retraining."""
        return any(kind.needs_retraining(_of(m, shared), documents) for m, kind in self.members.items())

    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Build a segment of each member."""
        built = {m: kind.segment(encoded.parts[m], numbers, _of(m, shared)) for m, kind in self.members.items()}
        return _together(built, numbers.astype(np.int32))

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Merge the segments of each member."""
        merged = {m: kind.merge([_of(m, s) for s in segments], live) for m, kind in self.members.items()}
        return _together(merged, np.sort(np.concatenate([s["documents"][live[s["documents"]]] for s in segments])))

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> HybridSearcher:
        """Return the searchers of all members."""
        parts = {
            m: kind.searcher(_of(m, shared), [_of(m, s) for s in segments], documents)
            for m, kind in self.members.items()
        }
        return HybridSearcher(parts, documents)

    def queries(self, encoder: Any, texts: Sequence[str], settings: HybridSettings) -> Any:
        """Encode queries for each member."""
        from ..retrieval.encoders.multi_encoder import MultiEncoded

        return MultiEncoded(
            {m: kind.queries(encoder.encoders[m], texts, own) for m, (kind, own, _) in self._asked(settings).items()}
        )

    def search(
        self,
        searcher: HybridSearcher,
        query: Any,
        k: int,
        settings: HybridSettings,
        allow: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best documents of the fused rankings."""
        from ..retrieval.ranking import top_documents

        rankings = self._found(searcher, query, k, settings, allow)
        documents, index = np.unique(np.concatenate([d for d, _ in rankings.values()]), return_inverse=True)
        addends = np.concatenate([s for _, s in rankings.values()])
        return top_documents(documents, np.bincount(index, addends, len(documents)).astype(np.float32), k)

    def explain(
        self, searcher: HybridSearcher, encoder: Any, query: str, text: str, number: int, settings: Any, allow: Any
    ) -> list[ScoreExplanation]:
        """Return the contribution of each member, and the rank at which it found the document."""
        del text
        rankings = self._found(searcher, self.queries(encoder, [query], settings)[0], 1, settings, allow)
        reasons = []
        for member, (documents, addends) in rankings.items():
            index = np.flatnonzero(documents == number)
            if len(index):
                reasons.append(ScoreExplanation(member, f"rank {index[0] + 1}", float(addends[index[0]])))
            else:
                reasons.append(ScoreExplanation(member, None, 0.0, imputed=True))
        return reasons

    def term_weights(self, encoder: Any, query: str, text: str, settings: HybridSettings) -> TermWeights | None:
        """Return the term weights from the first member that uses terms."""
        asked = self._asked(settings).items()
        results = (kind.term_weights(encoder.encoders[m], query, text, own) for m, (kind, own, _) in asked)
        return next((weights for weights in results if weights is not None), None)

    def _asked(self, settings: HybridSettings) -> dict[str, tuple[Any, Any, float]]:
        """Return the enabled members, with their settings and weights.

        Raises:
            RetrievalError: A setting is invalid.
        """
        from ..retrieval.errors import RetrievalError

        for by_member in (settings.weights, settings.settings):
            if stray := sorted(set(by_member) - set(self.members)):
                raise RetrievalError(f"hybrid setting: {stray[0]!r} is none of {', '.join(self.members)}")
        asked = {}
        for m, kind in self.members.items():
            try:
                own = build_options(kind.Settings, dict(settings.settings.get(m, {})), f"{m} setting")
            except ConfigError as error:
                raise RetrievalError(str(error)) from None
            if kind.rescored(own):
                raise RetrievalError(f"{m} setting: rerank is not for members of a hybrid")
            if (weight := float(settings.weights.get(m, 1.0))) > 0:
                asked[m] = kind, own, weight
        if not asked:
            raise RetrievalError("hybrid setting: weights leave out every member; give one of them a weight above 0")
        return asked

    def _found(
        self, searcher: HybridSearcher, query: Any, k: int, settings: HybridSettings, allow: NDArray[np.uint8] | None
    ) -> dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Return for each member the documents that it found, best first, and their addends to the fused scores."""
        from ..retrieval.ranking import search_until_found

        depth = max(k, settings.depth)
        possible = min(depth, searcher.documents if allow is None else int(np.unpackbits(allow).sum()))
        rankings = {}
        for m, (kind, own, weight) in self._asked(settings).items():
            documents, scores = search_until_found(kind, searcher.parts[m], query.parts[m], depth, own, possible, allow)
            if settings.fusion == "rrf":
                addends = 1 / (settings.constant + 1 + np.arange(len(documents), dtype=np.float32))
            else:
                low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
                addends = (scores - low) / (high - low) if high > low else np.ones(len(scores), np.float32)
            rankings[m] = documents, (weight * addends).astype(np.float32)
        return rankings


def _joined(parts: Mapping[str, Arrays]) -> dict[str, NDArray]:
    return {f"{m}{BETWEEN}{name}": a for m, arrays in parts.items() for name, a in arrays.items()}


def _together(parts: Mapping[str, tuple[int, Arrays]], numbers: NDArray[np.int32]) -> tuple[int, Arrays]:
    rows = sum(n for n, _ in parts.values())
    return rows, {"documents": numbers, **_joined({m: arrays for m, (_, arrays) in parts.items()})}


def _of(member: str, arrays: Arrays) -> dict[str, NDArray]:
    """Return the arrays of a member."""
    prefix = f"{member}{BETWEEN}"
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


@hookimpl
def register_indexes(register: Register) -> None:
    """Register the plugin."""
    register(Hybrid)
