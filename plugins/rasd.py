"""RASD, retrieval-augmented speculative decoding (arXiv 2503.03434): text seen before, fused with a drafter's tree.

    T_d = the tree of the base drafter, with its probabilities
    R   = what followed where the end of the text was seen before: here, in earlier outputs, in a datastore
    T_r = trie of R, pruned by the base drafter's probabilities, which its tree holds already
    T   = fusion: paths of T_r are followed down T_d by longest matching prefix, the rest is grafted

The paper's thresholds and its datastore could not be verified, so pruning is learned: how often a retrieved token was
right is counted by its source, by the tokens that agreed, by its share among the continuations, and by whether the
base drafter lists it (`drafting.tries`). What falls below ``prune`` is dropped. Beyond the paper: earlier outputs as a
source (as suffix decoding keeps them, arXiv 2411.04975), and one scale of scores for both trees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .config import ConfigError
from .contracts import Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine, Int32, Unsupported
from .drafting.draft_model_drafter import DraftModelDrafter
from .hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from .drafting.datastore import Datastore
    from .drafting.history import TokenHistory

ENGINE = DraftModelDrafter.name
OWN, OUTPUTS, STORED = range(3)
NAMES = ("request", "outputs", "datastore")
NODES = 64  # of a trie, as REST keeps them (arXiv 2311.08252)
CONTEXT = 16  # tokens of a prompt's end that are remembered with its output


@dataclass(frozen=True)
class RASDOptions:
    """Options of RASD.

    Attributes:
        base: The drafter whose tree is fused with what is retrieved, with its default options; `engine` for a
            draft model that the engine runs; `none` for none.
        request: Retrieve from the request's own prompt and output.
        outputs: Tokens of earlier outputs that are kept and retrieved from, at 16 bytes each; 0 for none.
        datastore: Folder that `pilotfish datastore build` wrote.
        max_match: Tokens that are compared, at most.
        min_match: Tokens that have to agree.
        max_occurrences: Occurrences that are looked at.
        prune: Retrieved tokens with a lower estimated probability are dropped.
        base_feedback: Let what the base drafter thinks of a retrieved token count.
        fuse: Join both trees; without, the retrieved one is taken where there is one.
    """

    base: str = "token_recycling"
    request: bool = True
    outputs: int = 1 << 20
    datastore: str | None = None
    max_match: int = 24
    min_match: int = 2
    max_occurrences: int = 32
    prune: float = 0.02
    base_feedback: bool = True
    fuse: bool = True

    def __post_init__(self) -> None:
        bounds = (
            ("outputs", 0, 1 << 28),
            ("max_match", 2, 64),
            ("min_match", 2, self.max_match),
            ("max_occurrences", 1, 512),
        )
        for name, low, high in (*bounds, ("prune", 0, 1)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        if self.datastore is not None:
            from .drafting.suffix_array import SUFFIX_DEPTH

            if self.min_match > SUFFIX_DEPTH:
                raise ValueError(f"min_match: expected 2 to {SUFFIX_DEPTH} with a datastore, which compares no more")
        if self.base == "rasd":
            raise ValueError("base: rasd cannot be its own base")
        if not (self.request or self.outputs or self.datastore):
            raise ValueError("request: without outputs and a datastore there is nothing to retrieve from")


@dataclass
class _Request:
    """A live request: its text as it is written, and the tries of its last draft, by source."""

    text: "TokenHistory | None"
    kept: list[Int32]  # the prompt's end and the output, for `outputs`
    tries: list[tuple[int, Int32, Int32, Int32]] = field(default_factory=list)


class RASD(Drafter):
    """The drafter."""

    name: ClassVar[str] = "rasd"
    default_depth: ClassVar[int] = 24
    Options: ClassVar[type] = RASDOptions

    @classmethod
    def needs_draft_model(cls, options: RASDOptions) -> bool:
        """Whether a draft model is the base."""
        return options.base == ENGINE

    @classmethod
    def tokenizer(cls, options: RASDOptions) -> tuple[str, str] | None:
        """That of the datastore."""
        if options.datastore is None:
            return None
        about = _open_datastore(options.datastore).info
        return about.fingerprint, f"{options.datastore}, built with --tokenizer {about.tokenizer}"

    @classmethod
    def check(cls, options: RASDOptions, engine: Engine) -> None:
        """Refuse a missing compiler, a base that cannot serve, and a datastore of other tokens."""
        if find_spec("numba") is None:
            raise Unsupported(cls.name, "numba is not installed", "install pilotfish[vllm] or numba", engine.model)
        if (base := _base_drafter(options)) is not None:
            base[0].check(base[1], engine)
        if options.datastore is not None:
            about = _open_datastore(options.datastore).info
            if about.largest >= engine.vocab_size:
                raise Unsupported(
                    cls.name,
                    f"{options.datastore} holds tokens of {about.tokenizer}, beyond the vocabulary of "
                    f"{engine.vocab_size}",
                    "build it with --tokenizer of the model that is served",
                    engine.model,
                )

    def __init__(self, options: RASDOptions, engine: Engine) -> None:
        from .drafting import tries
        from .drafting.history import TokenHistory

        self._tries, self._history = tries, TokenHistory
        self.options, self.engine = options, engine
        base = _base_drafter(options)
        self.base: Drafter | None = None if base is None else base[0](base[1], engine)
        if self.base is not None:
            self.candidates, self.state_path = self.base.candidates, self.base.state_path
        self._outputs = TokenHistory(options.outputs) if options.outputs else None
        self._store = None if options.datastore is None else _open_datastore(options.datastore)
        self._seen, self._right = tries.make_acceptance_counts(len(NAMES))
        self._requests: dict[str, _Request] = {}

    # ------------------------------------------------------------------------------------------ life of a request

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Begin to keep the request's text."""
        if self.base is not None:
            self.base.start(request, prompt, tenant)
        text = self._history(len(prompt) + 1024) if self.options.request else None
        if text is not None:
            text.append(prompt)
        self._requests[request] = _Request(text, [np.array(prompt[-CONTEXT:], np.int32)])

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """See which retrieved tokens were right, and add what came to the text."""
        if self.base is not None:
            self.base.observe(request, tokens, candidates)
        live = self._requests[request]
        for source, *trie in live.tries:
            self._tries.update_acceptance_counts(source, *trie, tokens, self._seen, self._right)
        live.tries.clear()
        if len(tokens):
            live.kept.append(np.array(tokens, np.int32))
            if live.text is not None:
                live.text = live.text.with_capacity(len(tokens))
                live.text.append(tokens)

    def finish(self, request: str) -> None:
        """Forget the request; its output is kept for others."""
        if self.base is not None:
            self.base.finish(request)
        live = self._requests.pop(request, None)
        if live is not None and self._outputs is not None and len(live.kept) > 1:
            self._outputs.append(np.concatenate(live.kept), ends=True)

    # ----------------------------------------------------------------------------------------------------- propose

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """The base drafter's trees, each fused with what is retrieved for its request."""
        bases = [_NO_DRAFT] * len(requests) if self.base is None else self.base.propose(requests, budget)
        return [self._fused(r, base, budget) for r, base in zip(requests, bases, strict=True)]

    def _fused(self, request: DraftRequest, base: DraftTree, budget: DraftBudget) -> DraftTree:
        depth = min(budget.depth, request.limit)
        if depth < 1:
            return _NO_DRAFT
        room = len(NAMES) * NODES + len(base)
        tokens, parents, scores = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
        n = 0
        for source, length, followers in self._retrieve(request, depth):
            trie = self._trie(request.id, source, length, followers, base)
            n = self._tries.merge_tries(n, tokens, parents, scores, *trie)
        if n == 0:
            return base
        if self.options.fuse:
            n = self._tries.fuse_trees(n, tokens, parents, scores, base.tokens, base.parents, base.scores)
        return DraftTree(*self._tries.best_nodes(tokens[:n], parents[:n], scores[:n], budget.nodes))

    def _retrieve(self, request: DraftRequest, depth: int) -> list[tuple[int, int, Int32]]:
        """For each source that knows the text's end: which it is, how many tokens agree, what followed."""
        o, live = self.options, self._requests[request.id]
        found = []
        for source, history in ((OWN, live.text), (OUTPUTS, self._outputs)):
            if history is not None:
                length, followers = history.find_longest_suffix(
                    request.tokens, depth, o.max_occurrences, o.max_match, o.min_match
                )
                found.append((source, length, followers))
        if self._store is not None:
            match = self._store.find_longest_suffix(request.tokens, o.max_match, o.min_match)
            found.append((STORED, match.length, self._store.continuations(match, depth, o.max_occurrences)))
        return [(source, length, followers) for source, length, followers in found if len(followers)]

    def _trie(
        self, request: str, source: int, length: int, followers: Int32, base: DraftTree
    ) -> tuple[Int32, Int32, np.ndarray]:
        """What followed as a trie with scores, pruned; remembered until it is seen what came."""
        tokens, parents, counts, depths = (np.empty(NODES, np.int32) for _ in range(4))
        n = self._tries.build_trie(followers, tokens, parents, counts, depths)
        tokens, parents = tokens[:n], parents[:n]
        opinions = np.full(n, self._tries.UNKNOWN, np.int32)
        if self.options.base_feedback:
            self._tries.match_base_tree(tokens, parents, base.tokens, base.parents, base.scores, opinions)
        scores, cells = np.empty(n, np.float32), np.empty((n, 3), np.int32)
        learned = (self._seen, self._right)
        self._tries.score_trie(
            source, length, len(followers), parents, counts, depths, opinions, *learned, scores, cells
        )
        self._requests[request].tries.append((source, tokens, parents, cells))
        kept = np.flatnonzero(scores >= self.options.prune)  # with a node its ancestors, whose scores are no lower
        return self._tries.keep_nodes(kept, tokens, parents, scores)

    # ------------------------------------------------------------------------------------------------------- state

    def save(self, path: Path) -> None:
        """Write the base drafter's state."""
        if self.base is not None:
            self.base.save(path)

    def load(self, path: Path) -> None:
        """Read the base drafter's state."""
        if self.base is not None:
            self.base.load(path)

    def stats(self) -> dict[str, float]:
        """Those of the base drafter, and the memory of texts."""
        own = sum(r.text.nbytes for r in self._requests.values() if r.text is not None)
        outputs = 0 if self._outputs is None else self._outputs.nbytes
        base = {} if self.base is None else self.base.stats()
        kept = 0 if self._outputs is None else len(self._outputs)
        return {**base, "requests": len(self._requests), "text_bytes": own, "output_bytes": outputs, "outputs": kept}


_NO_DRAFT = DraftTree(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _base_drafter(options: RASDOptions) -> tuple[type[Drafter], Any] | None:
    """The base drafter's class and options.

    Raises:
        ConfigError: there is none of that name.
    """
    if options.base == "none":
        return None
    if options.base == ENGINE:
        return DraftModelDrafter, None
    from .manager import plugins

    cls = plugins().get("drafter", options.base, "pilotfish.drafter.base")
    return cls, cls.Options()  # type: ignore[attr-defined,return-value]


def _open_datastore(folder: str) -> "Datastore":
    """A datastore.

    Raises:
        ConfigError: it cannot be used.
    """
    from .drafting.datastore import Datastore, DatastoreError

    try:
        return Datastore(Path(folder))
    except DatastoreError as error:
        raise ConfigError(f"pilotfish.drafter.datastore: {error}") from None


@hookimpl
def register_drafters(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(RASD)
