"""Token Recycling (arXiv 2408.08696): the candidates that the model computes anyway are drafted from next time.

At every verified position, rejected ones too, the model's top-k tokens overwrite the row of the token at that position.
A draft is grown from the rows breadth-wise below the last accepted token, and verified in one pass.

    root = last accepted token
    draft: child r of a node = candidate r in the node's row
    verify, accept the longest matching path, one bonus token
    update: row[token at position] = top-k of the logits there, for ALL verified positions

Beyond the paper, each measured (`docs/token_recycling.md`): rows for longer contexts with the paper's row as fallback;
rows primed from the prompt; the tree grown by estimated acceptance, calibrated on line, instead of a fixed template.
"""

import contextlib
import glob
import io
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from .config import ConfigError
from .contracts import Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine, Int32, Unsupported
from .drafting import adjacency_table
from .drafting.template import static_tree
from .hookspecs import Register, hookimpl

FORMAT = 1  # of the state file


@dataclass(frozen=True)
class TokenRecyclingOptions:
    """Options of Token Recycling.

    Attributes:
        k: Candidates kept for each context (the paper's matrix width).
        order: Longest context, in tokens, that has rows of its own; 1 is the paper.
        bits: log2 of the number of rows for contexts longer than one token.
        prime: Read each prompt into the rows before its first draft.
        share: Who shares rows: all requests of the `engine`, those of one `tenant`, or none (`request`).
        max_tables: How many tables may exist when rows are not shared by all; the idle one unused longest goes first.
        state_path: File that keeps the shared rows between runs; read at start, written when the engine falls idle.
        shape: `dynamic` grows each tree where it is likeliest; `template` fills the paper's static tree, which then is
            verified whole, whatever a step costs.
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
    """The drafter; one int32 matrix (and its longer contexts) for each table, bounded, shared as ``share`` says."""

    name: ClassVar[str] = "token_recycling"
    default_depth: ClassVar[int] = 12
    default_nodes: ClassVar[int] = 80  # as many as the paper's tree has
    Options: ClassVar[type] = TokenRecyclingOptions

    @classmethod
    def check(cls, options: TokenRecyclingOptions, engine: Engine) -> None:
        """Refuse a missing compiler, a vocabulary too small for ``k``, and a state file that cannot serve."""
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
                cls._read(path, options, engine)
            if not writable:
                raise ConfigError(f"pilotfish.drafter.state_path: {path.parent} is not a folder that can be written")

    def __init__(self, options: TokenRecyclingOptions, engine: Engine) -> None:
        from .drafting import adjacency

        self._rows = adjacency
        self.options, self.engine = options, engine
        self.candidates, self.state_path = options.k, options.state_path
        self.fixed_size = options.shape == "template"
        self._template = static_tree() if self.fixed_size else None
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._table_of: dict[str, str] = {}  # request -> key of its table
        if options.state_path is not None and Path(options.state_path).exists():
            self.load(Path(options.state_path))

    # ------------------------------------------------------------------------------------------ life of a request

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Give the request its table, and read its prompt into it."""
        share = self.options.share
        key = "" if share == "engine" else f"tenant {tenant}" if share == "tenant" and tenant else f"request {request}"
        self._table_of[request] = key
        table = self._table(key)
        if self.options.prime:
            self._rows.prime_from_text(table.rows, self.options.order, np.ascontiguousarray(prompt, np.int32))

    def finish(self, request: str) -> None:
        """Forget the request, and its table if nobody else can use it."""
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
        """Drop idle tables, the one unused longest first; those of live requests stay, even beyond the bound."""
        if len(self._tables) <= bound:
            return
        in_use = set(self._table_of.values())
        for idle in [k for k in self._tables if k and k not in in_use]:
            if len(self._tables) <= bound:
                break
            del self._tables[idle]

    # ------------------------------------------------------------------------------------------ learn and propose

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Score the rows that were drafted from by what came, then overwrite them with what the model thought."""
        table, order, c = self._table(self._table_of[request]), self.options.order, candidates
        accepted = _accepted(c, tokens)
        if len(tokens):
            before = np.append(c.context, c.inputs[:1])
            self._rows.update_acceptance_rates(table.rows, table.acceptance, order, before, tokens)
        self._rows.update_rows(table.rows, order, c.context, c.inputs, c.parents, accepted, c.ids, c.probs)

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Grow a tree for each request, best first, to the budget; which of it is verified is the engine's choice."""
        trees = []
        order, (tokens, parents, scores) = self.options.order, self._buffers(budget.nodes)
        for request in requests:
            table, depth = self._table(self._table_of[request.id]), min(budget.depth, request.limit)
            n, out = 0, (budget.nodes, depth, tokens, parents, scores)
            where = (table.rows, table.acceptance.rate, order, request.tokens[-order:])
            if depth > 0 and self._template is not None:
                n = self._rows.fill_static_tree(*where, *self._template, *out)
            elif depth > 0:
                n = self._rows.grow_tree(*where, *out)
            trees.append(DraftTree(tokens[:n].copy(), parents[:n].copy(), scores[:n].copy()))
        return trees

    @staticmethod
    def _buffers(nodes: int) -> tuple[Int32, Int32, Any]:
        return np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.float32)

    def stats(self) -> dict[str, float]:
        """Tables, their bytes, and requests in flight."""
        size = sum(a.nbytes for t in self._tables.values() for a in (*t.rows, *t.acceptance))
        return {"tables": len(self._tables), "bytes": size, "requests": len(self._table_of)}

    # ------------------------------------------------------------------------------------------------- state file

    def save(self, path: Path) -> None:
        """Write the shared rows; a reader never sees half a file."""
        table = self._table("")
        arrays = {**table.rows._asdict(), **table.acceptance._asdict()}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, meta=json.dumps(self._meta(self.options, self.engine)), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Take over the rows of a file; refuses one of another vocabulary, shape or format."""
        arrays = self._read(path, self.options, self.engine)
        table = self._table("")
        for target in (table.rows, table.acceptance):
            for field, array in target._asdict().items():
                array[...] = arrays[field]

    @classmethod
    def _read(cls, path: Path, options: TokenRecyclingOptions, engine: Engine) -> dict[str, Any]:
        where = f"pilotfish.drafter.state_path: {path}"
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = dict(json.loads(str(arrays.pop("meta"))))
        except Exception as error:  # zipfile, numpy and json each have their own; all mean the same here
            raise ConfigError(f"{where} is not a readable state file ({error})") from None
        for key, expected in cls._meta(options, engine).items():
            if meta.get(key) != expected:
                raise ConfigError(f"{where} was written with {key}={meta.get(key)}, this engine has {expected}")
        template = _Table(options, engine.vocab_size)
        for field, expected in {**template.rows._asdict(), **template.acceptance._asdict()}.items():
            array = arrays.get(field)
            if array is None or array.shape != expected.shape or array.dtype != expected.dtype:
                raise ConfigError(f"{where} is damaged: {field} is missing or of another shape")
        # Compiled code checks no bounds: what it will use as an index is checked here.
        tokens, confidence = arrays["tokens"], arrays["confidence"]
        sound = tokens.min() >= adjacency_table.NONE and tokens.max() < engine.vocab_size
        seen, right, rate = arrays["seen"], arrays["right"], arrays["rate"]
        sound = sound and bool(((seen > 0) & (right >= 0) & (right <= seen) & (rate >= 0) & (rate <= 1)).all())
        if not sound or confidence.max() >= adjacency_table.NUM_CONFIDENCES:
            raise ConfigError(f"{where} is damaged: it holds values out of range")
        return arrays

    @staticmethod
    def _meta(options: TokenRecyclingOptions, engine: Engine) -> dict[str, int]:
        return {
            "format": FORMAT,
            "vocab_size": engine.vocab_size,
            "k": options.k,
            "order": options.order,
            "bits": options.bits,
        }


class _Table:
    """Rows and their acceptance, as one group of requests shares them."""

    def __init__(self, options: TokenRecyclingOptions, vocab_size: int) -> None:
        self.rows = adjacency_table.make_adjacency_table(vocab_size, options.k, options.order, options.bits)
        self.acceptance = adjacency_table.make_acceptance_rates(options.order, options.k)


def _accepted(candidates: Candidates, tokens: Int32) -> np.ndarray:
    """Which rows lie on the accepted path, [n]: row 0, then the child that holds each accepted token in turn."""
    accepted = np.zeros(len(candidates.inputs), bool)
    node, accepted[0] = 0, True
    for token in tokens:
        children = np.flatnonzero((candidates.parents == node) & (candidates.inputs == token))
        if not len(children):
            break
        node = children[0]
        accepted[node] = True
    return accepted


def _sweep(path: Path, age: float = 60.0) -> None:
    """Remove what writers left beside ``path`` that were killed at their work more than ``age`` seconds ago."""
    for left in path.parent.glob(f"{glob.escape(path.name)}*.tmp"):
        with contextlib.suppress(OSError):  # another one was faster
            if time.time() - left.stat().st_mtime > age:
                left.unlink()


@hookimpl
def register_drafters(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(TokenRecycling)
