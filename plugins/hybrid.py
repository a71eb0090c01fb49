"""Several kinds of index in one folder, asked together: reciprocal-rank fusion (SIGIR 2009), or a sum of scores.

    rrf    sum over members of weight / (constant + rank)
    score  sum over members of weight * (score - least) / (greatest - least), least and greatest of those it found

Every member keeps arrays of its own under its name; documents, filters, deletion and commits are shared.
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

MAX_CANDIDATES = 1e6  # of a weight
BETWEEN = "."  # a member's name and that of its array


@dataclass(frozen=True)
class HybridOptions:
    """Options of a hybrid, fixed when an index is made.

    Attributes:
        members: Kinds of index, with a + between them.
        options: Of members, by their names.
    """

    members: str = "xtr+vdr+bm25+dense"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.members.split("+")
        if len(set(names)) < len(names) or len(names) < 2 or "hybrid" in names:
            raise ValueError(f"members: expected two or more other kinds, each once, got {self.members!r}")
        if stray := sorted(set(self.options) - set(names)):
            raise ValueError(f"options: {stray[0]!r} is no member")
        for name in names:
            plugins().resolve("index", Selection(name, dict(self.options.get(name, {}))))


@dataclass(frozen=True)
class HybridSettings:
    """How a hybrid is searched.

    Attributes:
        fusion: `rrf` by ranks, `score` by scores.
        constant: Of rrf: the greater, the less a first rank is above the next ones.
        depth: Documents that each member finds.
        weights: Of members, 1 where nothing is said; 0 leaves one out.
        settings: Of members, by their names.
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
        if any(not 0 <= w <= MAX_CANDIDATES for w in self.weights.values()):
            raise ValueError(f"weights: expected 0 to {MAX_CANDIDATES:g}, got {dict(self.weights)}")


@dataclass(frozen=True)
class HybridSearcher:
    """Those of members, and how many documents there are."""

    parts: Mapping[str, Any]
    documents: int


class Hybrid(IndexKind):
    """Members that are asked together; see the module."""

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
        """``default``, or an encoder for some members: ``xtr=FOLDER,vdr=FOLDER``."""
        from ..retrieval.encoders.multi_encoder import MultiEncoder
        from ..retrieval.errors import RetrievalError
        from ..retrieval.registry import resolve_encoder

        chosen = {m: kind.default_encoder for m, kind in self.members.items()}
        if name != self.default_encoder:
            for part in name.split(","):
                member, _, encoder = part.partition("=")
                if member not in chosen or not encoder:
                    raise RetrievalError(f"encoder {part}: expected MEMBER=ENCODER of {', '.join(chosen)}")
                chosen[member] = encoder
        made = {m: resolve_encoder(self.members[m], encoder, device, precision) for m, encoder in chosen.items()}
        return MultiEncoder(made)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """What each learns."""
        return _joined({m: kind.train(encoded.parts[m], expected) for m, kind in self.members.items()})

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """When one of them is."""
        return any(kind.needs_retraining(_of(m, shared), documents) for m, kind in self.members.items())

    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Postings of each."""
        made = {m: kind.segment(encoded.parts[m], numbers, _of(m, shared)) for m, kind in self.members.items()}
        return _together(made, numbers.astype(np.int32))

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Postings of each, merged."""
        made = {m: kind.merge([_of(m, s) for s in segments], live) for m, kind in self.members.items()}
        return _together(made, np.sort(np.concatenate([s["documents"][live[s["documents"]]] for s in segments])))

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> HybridSearcher:
        """Those of all members."""
        parts = {
            m: kind.searcher(_of(m, shared), [_of(m, s) for s in segments], documents)
            for m, kind in self.members.items()
        }
        return HybridSearcher(parts, documents)

    def queries(self, encoder: Any, texts: Sequence[str], settings: HybridSettings) -> Any:
        """What each member takes."""
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
        """The best of what all found."""
        from ..retrieval.ranking import top_documents

        found = self._found(searcher, query, k, settings, allow)
        documents, place = np.unique(np.concatenate([d for d, _ in found.values()]), return_inverse=True)
        shares = np.concatenate([s for _, s in found.values()])
        return top_documents(documents, np.bincount(place, shares, len(documents)).astype(np.float32), k)

    def explain(
        self, searcher: HybridSearcher, encoder: Any, query: str, text: str, number: int, settings: Any, allow: Any
    ) -> list[ScoreExplanation]:
        """What each member adds, and at which rank it found the document."""
        del text
        found = self._found(searcher, self.queries(encoder, [query], settings)[0], 1, settings, allow)
        reasons = []
        for member, (documents, shares) in found.items():
            place = np.flatnonzero(documents == number)
            if len(place):
                reasons.append(ScoreExplanation(member, f"rank {place[0] + 1}", float(shares[place[0]])))
            else:
                reasons.append(ScoreExplanation(member, None, 0.0, imputed=True))
        return reasons

    def term_weights(self, encoder: Any, query: str, text: str, settings: HybridSettings) -> TermWeights | None:
        """That of the first member that reads words."""
        asked = self._asked(settings).items()
        readings = (kind.term_weights(encoder.encoders[m], query, text, own) for m, (kind, own, _) in asked)
        return next((found for found in readings if found is not None), None)

    def _asked(self, settings: HybridSettings) -> dict[str, tuple[Any, Any, float]]:
        """Members that take part, their settings and weights.

        Raises:
            RetrievalError: a setting is wrong.
        """
        from ..retrieval.errors import RetrievalError

        for given in (settings.weights, settings.settings):
            if stray := sorted(set(given) - set(self.members)):
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
            raise RetrievalError("hybrid setting: weights leave out every member")
        return asked

    def _found(
        self, searcher: HybridSearcher, query: Any, k: int, settings: HybridSettings, allow: NDArray[np.uint8] | None
    ) -> dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Documents that each member found, best first, and what each adds to their scores."""
        from ..retrieval.ranking import search_until_found

        depth = max(k, settings.depth)
        possible = min(depth, searcher.documents if allow is None else int(np.unpackbits(allow).sum()))
        found = {}
        for m, (kind, own, weight) in self._asked(settings).items():
            documents, scores = search_until_found(kind, searcher.parts[m], query.parts[m], depth, own, possible, allow)
            if settings.fusion == "rrf":
                shares = 1 / (settings.constant + 1 + np.arange(len(documents), dtype=np.float32))
            else:
                low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
                shares = (scores - low) / (high - low) if high > low else np.ones(len(scores), np.float32)
            found[m] = documents, (weight * shares).astype(np.float32)
        return found


def _joined(parts: Mapping[str, Arrays]) -> dict[str, NDArray]:
    return {f"{m}{BETWEEN}{name}": a for m, arrays in parts.items() for name, a in arrays.items()}


def _together(parts: Mapping[str, tuple[int, Arrays]], numbers: NDArray[np.int32]) -> tuple[int, Arrays]:
    rows = sum(n for n, _ in parts.values())
    return rows, {"documents": numbers, **_joined({m: arrays for m, (_, arrays) in parts.items()})}


def _of(member: str, arrays: Arrays) -> dict[str, NDArray]:
    """A member's own arrays."""
    begin = f"{member}{BETWEEN}"
    return {name.removeprefix(begin): a for name, a in arrays.items() if name.startswith(begin)}


@hookimpl
def register_indexes(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(Hybrid)
