"""Quest: query-aware selection of KV pages (arXiv 2406.10774).

The KV cache is divided into pages. For each page the elementwise minimum and maximum of its keys are stored. They bound
how much a query can attend to any token of the page (section 3.3, algorithm 1):

    page bounds             m = min over the page's keys, M = max over the page's keys, for each channel
    score of a page         sum over the channels i of max(q_i m_i, q_i M_i), an upper bound of q k for its keys k
    decode step             score all pages by their bounds, then attend to the top-k pages only
    first layers            full attention (the paper's first two: nearly all of their tokens matter)

Every layer after the first ones selects its own pages at every decode step, and reads these pages only. All KV blocks
stay in memory, and the bounds take 1/32 more.

Differences from the paper: pages have 32 tokens (16 in the paper). With grouped-query attention, the query heads of a
KV head share a selection, by the sum of their softmax over the bounds; ``head_aggregation=head`` selects for each query
head. Sinks and recent tokens are always kept.

The static methods of `Quest` are the float64 reference of the kernels in ``kvcache/kernels/page_bounds.cpp``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..kvcache.reference import Float64
from ..kvcache.selection import PAGE_SIZE, ReadPlan, Role, SelectionRule
from . import compiler_check
from .contracts import Engine, KVPolicy, Unsupported
from .hookspecs import Register, hookimpl


@dataclass(frozen=True)
class QuestOptions:
    """Options of Quest.

    Attributes:
        budget: Number of tokens that a layer reads, in whole pages of 32. Requests with a shorter context are served by
            stock attention.
        full_layers: Number of first layers that compute full attention.
        head_aggregation: Which heads share a selection: the query heads of a KV head (``kv_head``), every query head
            has its own (``head``, as in the paper), or all heads share one, by the ``sum`` or the ``max`` of their
            estimated attention.
        sinks: Number of first tokens that are always kept.
        recent: Number of latest tokens that are always kept; an eighth of the budget if not given.
    """

    budget: int = 512
    full_layers: int = 2
    head_aggregation: Literal["kv_head", "head", "sum", "max"] = "kv_head"
    sinks: int = 4
    recent: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("budget", 1), ("full_layers", 0), ("sinks", 0), ("recent", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value <= 1 << 24:
                raise ValueError(f"{name}: expected {low} to {1 << 24}, got {value}")
        if self.budget % PAGE_SIZE:
            raise ValueError(f"budget: expected a multiple of {PAGE_SIZE}, got {self.budget}")
        if self.budget < (least := self.rule.min_budget):
            raise ValueError(
                f"budget: expected at least {least} to hold {self.sinks} sinks, {self.rule.recent} recent tokens "
                f"and one selected page, got {self.budget}"
            )

    @property
    def rule(self) -> SelectionRule:
        """The selection rule that these options describe."""
        recent = self.budget // 8 if self.recent is None else self.recent
        return SelectionRule(self.budget, self.sinks, recent, self.head_aggregation, "page")


class Quest(KVPolicy):
    """Sparse attention: layers select pages by key bounds.

    The policy gives every layer its role in a decode step.
    """

    name: ClassVar[str] = "quest"
    Options: ClassVar[type] = QuestOptions

    @classmethod
    def check(cls, options: QuestOptions, engine: Engine) -> None:
        """Refuse an engine in which no layer would select pages, and a machine that cannot run the kernels."""
        if engine.device != "cpu":
            raise Unsupported(
                cls.name,
                "the bounds of its pages are kept on CPUs only",
                "use tidal_decode, or run without the policy",
                engine.model,
            )
        if engine.layers and not any(layer >= options.full_layers for layer in engine.attention_layers):
            raise Unsupported(
                cls.name,
                f"no layer would select pages: with full_layers={options.full_layers}, all of its "
                f"{len(engine.attention_layers)} layers that attend to all tokens compute full attention",
                "lower full_layers, or run without the policy",
                engine.model,
            )
        compiler_check.require_compiler(cls.name, engine)

    def __init__(self, options: QuestOptions, engine: Engine) -> None:
        self.options = options
        self.engine = engine

    def read_plan(self) -> ReadPlan:
        """Return the role of every layer, in the order of the model."""
        first = self.options.full_layers
        attending = set(self.engine.attention_layers)
        roles = tuple(
            Role.PAGE_BOUNDS if layer >= first and layer in attending else Role.FULL
            for layer in range(self.engine.layers)
        )
        return ReadPlan(roles, self.options.rule)

    # ---------------------------------------------------------------------------------- the algorithm, in NumPy

    @staticmethod
    def page_bounds(keys: NDArray) -> tuple[NDArray, NDArray]:
        """Return the elementwise minimum and maximum of the keys of each page, each [pages, num_kv_heads, head_size].

        Args:
            keys: [context, num_kv_heads, head_size]; the last page may be incomplete.
        """
        pages = [keys[begin : begin + PAGE_SIZE] for begin in range(0, len(keys), PAGE_SIZE)]
        return np.stack([page.min(0) for page in pages]), np.stack([page.max(0) for page in pages])

    @staticmethod
    def bound_logits(query: NDArray, bounds: tuple[NDArray, NDArray], scale: float) -> Float64:
        """Return an upper bound of each head's scaled query-key products in each page (algorithm 1).

        Args:
            query: [num_heads, head_size].
            bounds: Result of `page_bounds`.
            scale: Softmax scale.

        Returns:
            [num_heads, pages] float64.
        """
        low, high = (bound.astype(np.float64) for bound in bounds)
        num_queries_per_kv = len(query) // low.shape[1]
        result = np.empty((len(query), len(low)))
        for head in range(len(query)):
            q, kv_head = query[head].astype(np.float64), head // num_queries_per_kv
            result[head] = np.maximum(q * low[:, kv_head], q * high[:, kv_head]).sum(1)
        return result * scale


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(Quest)
