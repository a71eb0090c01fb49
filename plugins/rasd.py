"""RASD: retrieval-augmented speculative decoding (arXiv 2503.03434).

Text that continues like earlier text is drafted from that text, and fused with the draft tree of another drafter:

    T_d = the draft tree of the base drafter, with its probabilities
    R   = continuations of the longest suffix of the text that occurs elsewhere: in the request's own text, in earlier
          outputs, in a datastore
    T_r = trie of R, pruned by the base drafter's probabilities, which its tree already holds
    T   = fusion of T_r and T_d: paths that both trees share are merged (longest matching prefix), the rest is grafted

The paper's pruning threshold and its datastore could not be verified, so pruning is learned: the acceptance rate of a
retrieved token is counted by its source, by the length of the match, by its share among the continuations, and by
whether the base drafter's tree lists it. Tokens whose path is estimated below ``prune`` are dropped. The acceptance
rate of the base drafter's tokens is counted too, by their probability and that of their retrieved siblings, so that
one scale of scores holds for both trees. Not in the paper: these counts, and earlier outputs as a source (as in
suffix decoding, arXiv 2411.04975).

`RASD.retrieval_trie` and `RASD.fuse` are the tree operations in plain Python. The compiled version, with the acceptance
counts, is in ``drafting/tries.py``; both give the same paths and scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .config import ConfigError
from .contracts import (
    Candidates,
    DeviceDrafter,
    DeviceLimits,
    DraftBudget,
    Drafter,
    DraftRequest,
    DraftTree,
    Engine,
    Int32,
    Unsupported,
)
from .drafting.acceptance_counts import BASE, UNKNOWN, make_acceptance_counts
from .drafting.draft_model_drafter import DraftModelDrafter
from .hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from .drafting.datastore import Datastore
    from .drafting.history import TokenHistory

ENGINE = DraftModelDrafter.name
REQUEST, OUTPUTS, DATASTORE = range(3)
SOURCES = ("request", "outputs", "datastore")
TRIE_NODES = 64  # as in REST (arXiv 2311.08252)
DEVICE_OUTPUTS = 1 << 22  # a device reads all of them in each step
DEVICE_OCCURRENCES = 64  # a device compares each with each
PROMPT_CONTEXT = 16  # tokens from the end of a prompt that are kept with its output


@dataclass(frozen=True)
class RASDOptions:
    """Options of RASD.

    Attributes:
        base: Name of the drafter whose tree (T_d in the paper) is fused with the retrieved one, with its default
            options; ``engine`` for a draft model that the engine runs; ``none`` for none.
        request: Whether to retrieve from the request's own prompt and output.
        outputs: Number of tokens of earlier outputs that are kept and retrieved from, at 16 bytes each; 0 for none.
        datastore: Folder written by `pilotfish datastore build`.
        max_match: Largest number of tokens that are compared.
        min_match: Smallest number of tokens that have to match.
        max_occurrences: Largest number of occurrences whose continuations are used.
        prune: Retrieved tokens whose estimated acceptance probability is lower are dropped.
        base_feedback: Whether the base drafter's tree counts in the estimate for a retrieved token.
        fuse: Whether both trees are fused; otherwise the retrieved tree is used where there is one.
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
    """A live request: its text so far, and the tries of its last draft, by source."""

    text: "TokenHistory | None"
    output: list[Int32]  # the end of the prompt and the output, for `outputs`
    tries: list[tuple[int, Int32, Int32, Int32]] = field(default_factory=list)


class RASD(Drafter):
    """Drafts from retrieved text, fused with a base drafter."""

    name: ClassVar[str] = "rasd"
    default_depth: ClassVar[int] = 64
    Options: ClassVar[type] = RASDOptions

    @classmethod
    def needs_draft_model(cls, options: RASDOptions) -> bool:
        """Return whether the base drafter is a draft model that the engine runs."""
        return options.base == ENGINE

    @classmethod
    def tokenizer(cls, options: RASDOptions) -> tuple[str, str] | None:
        """Return the fingerprint of the datastore's tokenizer, and its description."""
        if options.datastore is None:
            return None
        about = _open_datastore(options.datastore).info
        return about.fingerprint, f"{options.datastore}, built with --tokenizer {about.tokenizer}"

    @classmethod
    def check(cls, options: RASDOptions, engine: Engine) -> None:
        """Refuse a missing numba, a base drafter that cannot be used, and a datastore of another tokenizer."""
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

    @classmethod
    def device_drafter(cls, options: RASDOptions, engine: Engine, limits: DeviceLimits) -> DeviceDrafter:
        """Return the drafter with its texts and its datastore on the device."""
        from .drafting.rasd_device import DeviceRASD  # needs Triton
        from .drafting.token_recycling_device import DeviceTokenRecycling

        base = _base_drafter(options)
        tables = None if base is None else DeviceTokenRecycling(base[1], engine, limits)
        store = None if options.datastore is None else _open_datastore(options.datastore)
        if store is not None and limits.device.type == "cuda":
            import torch

            need, free = store.tokens.nbytes + store.order.nbytes, torch.cuda.mem_get_info(limits.device)[0]
            if need > free:
                reason = f"the datastore takes {need >> 20:,} MiB on the device, which has {free >> 20:,} MiB"
                raise Unsupported(cls.name, reason, "build it with fewer tokens, or remove datastore", engine.model)
        return DeviceRASD(options, tables, limits, PROMPT_CONTEXT, store)

    @classmethod
    def check_device(cls, options: RASDOptions, engine: Engine, trees: bool = False) -> None:
        """Refuse other base drafters than Token Recycling, and what a device cannot search in a step."""
        refused = (
            (
                options.base not in ("token_recycling", "none"),
                f"base={options.base}",
                "set base to token_recycling or none",
            ),
            (
                options.outputs > DEVICE_OUTPUTS,
                f"outputs={options.outputs}",
                f"set outputs to {DEVICE_OUTPUTS} or less",
            ),
            (
                options.max_occurrences > DEVICE_OCCURRENCES,
                f"max_occurrences={options.max_occurrences}",
                f"set max_occurrences to {DEVICE_OCCURRENCES} or less",
            ),
            (
                trees and not options.fuse,
                "fuse=false with verification=tree",
                "omit one of the two",
            ),
        )
        for applies, what, remedy in refused:
            if applies:
                reason = f"{what} is not supported on the V2 model runner"
                raise Unsupported(cls.name, reason, f"{remedy}, or set VLLM_USE_V2_MODEL_RUNNER=0", engine.model)

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
        self._num_verified, self._num_accepted = make_acceptance_counts(len(SOURCES))
        self._requests: dict[str, _Request] = {}

    # ------------------------------------------------------------------------------------------------- requests

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Start to keep the request's text."""
        if self.base is not None:
            self.base.start(request, prompt, tenant)
        text = self._history(len(prompt) + 1024) if self.options.request else None
        if text is not None:
            text.append(prompt)
        self._requests[request] = _Request(text, [np.array(prompt[-PROMPT_CONTEXT:], np.int32)])

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Count which retrieved tokens were accepted, and append the accepted tokens to the text."""
        if self.base is not None:
            self.base.observe(request, tokens, candidates)
        live = self._requests[request]
        for source, *trie in live.tries:
            self._tries.update_acceptance_counts(source, *trie, tokens, self._num_verified, self._num_accepted)
        live.tries.clear()
        if len(tokens):
            live.output.append(np.array(tokens, np.int32))
            if live.text is not None:
                live.text = live.text.with_capacity(len(tokens))
                live.text.append(tokens)

    def finish(self, request: str) -> None:
        """Forget the request; its output is kept as a source for other requests."""
        if self.base is not None:
            self.base.finish(request)
        live = self._requests.pop(request, None)
        if live is not None and self._outputs is not None and len(live.output) > 1:
            self._outputs.append(np.concatenate(live.output), ends=True)

    # ----------------------------------------------------------------------------------------------------- propose

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Return the base drafter's trees, each fused with the continuations retrieved for its request."""
        bases = [_NO_DRAFT] * len(requests) if self.base is None else self.base.propose(requests, budget)
        return [self._fused(r, base, budget) for r, base in zip(requests, bases, strict=True)]

    def _fused(self, request: DraftRequest, base: DraftTree, budget: DraftBudget) -> DraftTree:
        depth = min(budget.depth, request.limit)
        if depth < 1:
            return _NO_DRAFT
        room = len(SOURCES) * TRIE_NODES + len(base)
        tokens, parents, scores = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
        n = 0
        for source, length, followers in self._retrieve(request, depth):
            trie = self._trie(request.id, source, length, followers, base)
            n = self._tries.merge_tries(n, tokens, parents, scores, *trie)
        if n == 0:
            return base
        if self.options.fuse:
            cells = np.empty((len(base), 3), np.int32)
            tree = base.tokens, base.parents, base.scores
            n = self._tries.fuse_trees(n, tokens, parents, scores, *tree, self._num_verified, self._num_accepted, cells)
            self._requests[request.id].tries.append((BASE, base.tokens, base.parents, cells))
        return DraftTree(*self._tries.best_nodes(tokens[:n], parents[:n], scores[:n], budget.nodes))

    def _retrieve(self, request: DraftRequest, depth: int) -> list[tuple[int, int, Int32]]:
        """Return (source, match length, continuations [occurrences, depth]) for each source that has a match."""
        o, live = self.options, self._requests[request.id]
        results = []
        for source, history in ((REQUEST, live.text), (OUTPUTS, self._outputs)):
            if history is not None:
                length, followers = history.find_longest_suffix(
                    request.tokens, depth, o.max_occurrences, o.max_match, o.min_match
                )
                results.append((source, length, followers))
        if self._store is not None:
            match = self._store.find_longest_suffix(request.tokens, o.max_match, o.min_match)
            results.append((DATASTORE, match.length, self._store.continuations(match, depth, o.max_occurrences)))
        return [(source, length, followers) for source, length, followers in results if len(followers)]

    def _trie(
        self, request: str, source: int, length: int, followers: Int32, base: DraftTree
    ) -> tuple[Int32, Int32, np.ndarray]:
        """Build the scored and pruned trie of continuations; it is kept until the accepted tokens are known."""
        tokens, parents, counts, depths = (np.empty(TRIE_NODES, np.int32) for _ in range(4))
        n = self._tries.build_trie(followers, tokens, parents, counts, depths)
        tokens, parents = tokens[:n], parents[:n]
        feedback = np.full(n, UNKNOWN, np.int32)
        if self.options.base_feedback:
            self._tries.match_base_tree(tokens, parents, base.tokens, base.parents, base.scores, feedback)
        scores, cells = np.empty(n, np.float32), np.empty((n, 3), np.int32)
        learned = (self._num_verified, self._num_accepted)
        self._tries.score_trie(
            source, length, len(followers), parents, counts, depths, feedback, *learned, scores, cells
        )
        self._requests[request].tries.append((source, tokens, parents, cells))
        likely = np.flatnonzero(scores >= self.options.prune)  # ancestors stay: their scores are no lower
        return self._tries.keep_nodes(likely, tokens, parents, scores)

    # -------------------------------------------------------------------------------- the algorithm, in plain Python

    @staticmethod
    def retrieval_trie(continuations: Sequence[Sequence[int]]) -> dict[tuple[int, ...], int]:
        """Return the trie of continuations (T_r) as its paths, each with the number of continuations through it."""
        counts: dict[tuple[int, ...], int] = {}
        for continuation in continuations:
            for end in range(1, len(continuation) + 1):
                path = tuple(continuation[:end])
                counts[path] = counts.get(path, 0) + 1
        return counts

    @staticmethod
    def fuse(
        retrieved: Mapping[tuple[int, ...], float],
        base: Mapping[tuple[int, ...], float],
        rate: Callable[[float, float], float],
    ) -> dict[tuple[int, ...], float]:
        """Fuse two trees, each given as the acceptance probability of every path from the root.

        Args:
            retrieved: T_r, prefixes before longer paths.
            base: T_d, prefixes before longer paths.
            rate: Acceptance rate of a token that only T_d has, by its probability in T_d given its prefix, and by the
                total probability of the retrieved tokens in its place. The base drafter does not know what was
                retrieved, so its own probability is too high where T_r has other tokens.

        Returns:
            T: every path of either tree. Paths of both trees (longest matching prefix) keep the probability of T_r.
        """
        fused = dict(retrieved)
        # The probability that the retrieved children of a path take.
        taken: dict[tuple[int, ...], float] = {}
        for path, score in retrieved.items():
            parent_score = retrieved[path[:-1]] if len(path) > 1 else 1.0
            taken[path[:-1]] = taken.get(path[:-1], 0.0) + score / max(parent_score, 1e-9)
        for path, score in base.items():
            if path in retrieved:
                continue
            parent = path[:-1]
            conditional = score / max(base[parent] if parent else 1.0, 1e-9)
            fused[path] = (fused[parent] if parent else 1.0) * rate(conditional, taken.get(parent, 0.0))
        return fused

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
        """Return the statistics of the base drafter, and the memory of texts."""
        own = sum(r.text.nbytes for r in self._requests.values() if r.text is not None)
        outputs = 0 if self._outputs is None else self._outputs.nbytes
        base = {} if self.base is None else self.base.stats()
        tokens = 0 if self._outputs is None else len(self._outputs)
        return {**base, "requests": len(self._requests), "text_bytes": own, "output_bytes": outputs, "outputs": tokens}


_NO_DRAFT = DraftTree(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _base_drafter(options: RASDOptions) -> tuple[type[Drafter], Any] | None:
    """Return the base drafter's class and options.

    Raises:
        ConfigError: There is no drafter of that name.
    """
    if options.base == "none":
        return None
    if options.base == ENGINE:
        return DraftModelDrafter, None
    from .manager import plugins

    cls = plugins().get("drafter", options.base, "pilotfish.drafter.base")
    return cls, cls.Options()  # type: ignore[attr-defined,return-value]


def _open_datastore(folder: str) -> "Datastore":
    """Open a datastore.

    Raises:
        ConfigError: It cannot be used.
    """
    from .drafting.datastore import Datastore, DatastoreError

    try:
        return Datastore(Path(folder))
    except DatastoreError as error:
        raise ConfigError(f"pilotfish.drafter.datastore: {error}") from None


@hookimpl
def register_drafters(register: Register) -> None:
    """Register the drafter."""
    register(RASD)
