"""Token Recycling: draft from the candidate tokens of previous steps (arXiv 2408.08696).

Every step computes the top-k next tokens at every verified position, and normally discards them. Token Recycling keeps
them in an adjacency matrix and drafts from it (section 3, algorithm 1):

    M = adjacency matrix [vocab_size, k]: M[t] holds the top-k tokens that the model predicted after token t
    draft:   the root is the last accepted token; child r of a node is M[node, r], breadth first over a static tree
    verify:  the whole tree in one forward pass with tree attention
    accept:  the longest matching root-to-leaf path, plus one bonus token
    update:  M[token at a position] = top-k of the logits there, for all verified positions, rejected ones too

Not in the paper, each measured in ``docs/token_recycling.md``: rows for longer contexts, with the paper's row as
fallback; rows primed from the prompt; a tree that grows where acceptance is likeliest, by acceptance rates measured on
line, instead of the static tree (``shape=template`` selects the paper's).

`TokenRecycling.update_matrix` and `TokenRecycling.draft_static_tree` are the paper's algorithm in NumPy. The compiled
version, which adds the longer contexts and the dynamic tree, is in ``drafting/adjacency.py``; with ``order=1`` both
give the same matrix and the same tree.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .config import ConfigError
from .contracts import (
    ROOT,
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
from .drafting import adjacency_state, adjacency_table
from .drafting.template import static_tree
from .hookspecs import Register, hookimpl


@dataclass(frozen=True)
class TokenRecyclingOptions:
    """Options of Token Recycling.

    Attributes:
        k: Number of candidate tokens in a row of the adjacency matrix (k in the paper).
        order: Longest context, in tokens, that has its own rows; 1 is the paper.
        bits: log2 of the number of rows for contexts longer than one token.
        prime: Whether rows are filled from each prompt before its first draft.
        share: Which requests share a matrix: all requests of the ``engine``, those of one ``tenant``, or none
            (``request``).
        max_tables: Largest number of matrices where requests do not share one; the idle one unused longest is dropped.
        state_path: File that keeps the shared matrix between runs: read at start, written when the engine is idle.
        shape: ``dynamic`` grows each tree where acceptance is likeliest; ``template`` fills the paper's static tree,
            which is then always verified whole.
    """

    k: int = 8
    order: int = 4
    bits: int = 16
    prime: bool = True
    share: Literal["engine", "tenant", "request"] = "engine"
    max_tables: int = 64
    state_path: str | None = None
    shape: Literal["dynamic", "template"] = "dynamic"

    def __post_init__(self) -> None:
        for name, low, high in (("k", 1, 64), ("order", 1, 8), ("bits", 4, 24), ("max_tables", 1, 4096)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        if self.state_path is not None and self.share != "engine":
            raise ValueError(f"state_path: only rows shared by the engine are kept, not share={self.share!r}")


class TokenRecycling(Drafter):
    """Drafts from the top-k tokens of previous steps.

    There is one adjacency matrix, with rows for longer contexts, for each group of requests that shares one.
    """

    name: ClassVar[str] = "token_recycling"
    default_depth: ClassVar[int] = 12
    default_nodes: ClassVar[int] = 80  # the size of the paper's tree
    Options: ClassVar[type] = TokenRecyclingOptions

    @classmethod
    def check(cls, options: TokenRecyclingOptions, engine: Engine) -> None:
        """Refuse a missing numba, a vocabulary too small for ``k``, and a state file that cannot be used."""
        if find_spec("numba") is None:
            raise Unsupported(cls.name, "numba is not installed", "install pilotfish[vllm] or numba", engine.model)
        if engine.vocab_size < options.k:
            raise Unsupported(
                cls.name, f"k={options.k} exceeds the vocabulary of {engine.vocab_size}", "lower k", engine.model
            )
        if options.state_path is not None:
            path = Path(options.state_path)
            try:
                exists, writable = path.exists(), path.parent.is_dir() and os.access(path.parent, os.W_OK)
            except (OSError, ValueError) as error:  # a name too long, or with a zero byte
                raise ConfigError(f"pilotfish.drafter.state_path: not a path that can be used ({error})") from None
            if exists:
                adjacency_state.read_state(path, options, engine)
            if not writable:
                raise ConfigError(f"pilotfish.drafter.state_path: {path.parent} is not a folder that can be written")

    @classmethod
    def device_drafter(cls, options: TokenRecyclingOptions, engine: Engine, limits: DeviceLimits) -> DeviceDrafter:
        """Return the drafter with its tables on the device."""
        from .drafting.token_recycling_device import DeviceTokenRecycling  # needs Triton

        return DeviceTokenRecycling(options, engine, limits)

    @classmethod
    def check_device(cls, options: TokenRecyclingOptions, engine: Engine, trees: bool = False) -> None:
        """Refuse the static tree."""
        del trees
        if options.shape == "template":
            raise Unsupported(
                cls.name, "on the V2 model runner trees are dynamic", "remove shape=template", engine.model
            )

    def __init__(self, options: TokenRecyclingOptions, engine: Engine) -> None:
        from .drafting import adjacency  # compiles with numba

        self._adjacency = adjacency
        self.options, self.engine = options, engine
        self.candidates, self.state_path = options.k, options.state_path
        self.fixed_size = options.shape == "template"
        self._template = static_tree() if self.fixed_size else None
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._table_of: dict[str, str] = {}  # request -> key of its table
        if options.state_path is not None and Path(options.state_path).exists():
            self.load(Path(options.state_path))

    # ------------------------------------------------------------------------------------------------- requests

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Assign the request its matrix, and prime it from the prompt."""
        share = self.options.share
        key = "" if share == "engine" else f"tenant {tenant}" if share == "tenant" and tenant else f"request {request}"
        self._table_of[request] = key
        table = self._table(key)
        if self.options.prime:
            self._adjacency.prime_from_text(table.rows, self.options.order, np.ascontiguousarray(prompt, np.int32))

    def finish(self, request: str) -> None:
        """Forget the request, and its matrix if no other request can use it."""
        key = self._table_of.pop(request, None)
        if key is not None and key.startswith("request "):
            self._tables.pop(key, None)
        self._evict(self.options.max_tables)

    def _table(self, key: str) -> "_Table":
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        self._evict(self.options.max_tables - 1)
        table = self._tables[key] = _Table(self.options, self.engine.vocab_size)
        return table

    def _evict(self, bound: int) -> None:
        """Drop idle matrices, the one unused longest first; those of live requests stay, even above the bound."""
        if len(self._tables) <= bound:
            return
        in_use = set(self._table_of.values())
        for idle in [k for k in self._tables if k and k not in in_use]:
            if len(self._tables) <= bound:
                break
            del self._tables[idle]

    # ---------------------------------------------------------------------------------- the algorithm, in NumPy

    @staticmethod
    def update_matrix(matrix: Int32, tokens: Int32, top_k: Int32, accepted: NDArray[np.bool_]) -> None:
        """Update the adjacency matrix from one verification step (section 3.2).

        A token may stand at several positions. Its row then holds the candidates of the deepest accepted position, or
        of the first position where none was accepted.

        Args:
            matrix: [vocab_size, k] the adjacency matrix, updated in place.
            tokens: [n] the token at each verified position, the root first, parents before children.
            top_k: [n, k] the model's most probable next tokens at each position.
            accepted: [n] whether each position was accepted.
        """
        positions = range(len(tokens))
        # Rejected positions first, the last one before the others, so that an earlier write wins.
        for i in [p for p in reversed(positions) if not accepted[p]]:
            matrix[tokens[i]] = top_k[i]
        # Then accepted positions, so that the deepest one wins.
        for i in [p for p in positions if accepted[p]]:
            matrix[tokens[i]] = top_k[i]

    @staticmethod
    def draft_static_tree(matrix: Int32, root: int, parents: Int32, ranks: Int32) -> tuple[Int32, Int32]:
        """Draft the static tree breadth first from the adjacency matrix (section 3.3).

        Args:
            matrix: [vocab_size, k] the adjacency matrix; -1 where a row has no candidate of a rank.
            root: The last accepted token.
            parents: [nodes] parent of each node of the static tree, level by level; `ROOT` for children of the root.
            ranks: [nodes] which candidate of its parent's row each node is.

        Returns:
            Tokens and parents of the drafted tree. Nodes without a candidate are left out, with their descendants.
        """
        tokens: list[int] = []
        drafted_parents: list[int] = []
        index_of: dict[int, int] = {ROOT: ROOT}
        for node, (parent, rank) in enumerate(zip(parents.tolist(), ranks.tolist(), strict=True)):
            # A node whose parent was left out is left out too.
            if parent not in index_of:
                continue
            # token(node) = M[token(parent(node)), rank(node)]
            parent_token = root if parent == ROOT else tokens[index_of[parent]]
            token = int(matrix[parent_token, rank]) if rank < matrix.shape[1] else -1
            if token < 0:
                continue
            index_of[node] = len(tokens)
            tokens.append(token)
            drafted_parents.append(index_of[parent])
        return np.array(tokens, np.int32), np.array(drafted_parents, np.int32)

    # ------------------------------------------------------------------------------------------ learn and propose

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Update acceptance rates from the accepted tokens, then update the matrix for all verified positions."""
        table, order, c = self._table(self._table_of[request]), self.options.order, candidates
        accepted = _accepted(c, tokens)
        if len(tokens):
            before = np.append(c.context, c.inputs[:1])
            self._adjacency.update_acceptance_rates(table.rows, table.acceptance, order, before, tokens)
        self._adjacency.update_rows(table.rows, order, c.context, c.inputs, c.parents, accepted, c.ids, c.probs)

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Grow a tree for each request, best node first, up to the budget; the engine decides how much it verifies."""
        trees = []
        order, (tokens, parents, scores) = self.options.order, self._buffers(budget.nodes)
        for request in requests:
            table, depth = self._table(self._table_of[request.id]), min(budget.depth, request.limit)
            n, out = 0, (budget.nodes, depth, tokens, parents, scores)
            where = (table.rows, table.acceptance.rate, order, request.tokens[-order:])
            if depth > 0 and self._template is not None:
                n = self._adjacency.fill_static_tree(*where, *self._template, *out)
            elif depth > 0:
                n = self._adjacency.grow_tree(*where, *out)
            trees.append(DraftTree(tokens[:n].copy(), parents[:n].copy(), scores[:n].copy()))
        return trees

    @staticmethod
    def _buffers(nodes: int) -> tuple[Int32, Int32, Any]:
        return np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.float32)

    def stats(self) -> dict[str, float]:
        """Return the number of matrices, their bytes, and the number of requests in flight."""
        size = sum(a.nbytes for t in self._tables.values() for a in (*t.rows, *t.acceptance))
        return {"tables": len(self._tables), "bytes": size, "requests": len(self._table_of)}

    # ------------------------------------------------------------------------------------------------- state file

    def save(self, path: Path) -> None:
        """Write the shared matrix atomically."""
        table = self._table("")
        adjacency_state.write_state(path, self.options, self.engine, table.rows, table.acceptance)

    def load(self, path: Path) -> None:
        """Read the matrix that `save` wrote.

        Raises:
            ConfigError: The file is damaged, or has another vocabulary, shape or format.
        """
        table = self._table("")
        table.rows, table.acceptance = adjacency_state.read_state(path, self.options, self.engine)


class _Table:
    """The adjacency matrix and acceptance rates of one group of requests."""

    def __init__(self, options: TokenRecyclingOptions, vocab_size: int) -> None:
        self.rows = adjacency_table.make_adjacency_table(vocab_size, options.k, options.order, options.bits)
        self.acceptance = adjacency_table.make_acceptance_rates(options.order, options.k)


def _accepted(candidates: Candidates, tokens: Int32) -> np.ndarray:
    """Return which verified positions lie on the accepted path, [n] bool: position 0, then a child of each."""
    accepted = np.zeros(len(candidates.inputs), bool)
    node, accepted[0] = 0, True
    for token in tokens:
        children = np.flatnonzero((candidates.parents == node) & (candidates.inputs == token))
        if not len(children):
            break
        node = children[0]
        accepted[node] = True
    return accepted


@hookimpl
def register_drafters(register: Register) -> None:
    """Register the drafter."""
    register(TokenRecycling)
