"""Descriptions of a sparse decode step: the role of every layer, and the rule by which tokens are selected.

This module holds values only. `kernels.paged_decode` and `kernels.paged_triton` compute with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

PAGE_SIZE = 32  # tokens of a page; the C++ kernels process this many tokens at a time

HeadAggregation = Literal["head", "kv_head", "sum", "max", "union"]
Granularity = Literal["token", "page"]


class Role(Enum):
    """The role of a layer in a decode step."""

    FULL = "full attention"
    SELECT = "selects tokens, by the attention to all of them or to candidates"
    SPARSE = "attention over the selected tokens"
    WINDOW = "attention over the first tokens and the latest ones"
    PAGE_BOUNDS = "attention over pages selected by bounds of their keys"


@dataclass(frozen=True)
class SelectionRule:
    """A rule that selects tokens by the attention weights of one layer.

    Attributes:
        budget: Number of tokens that are kept, sinks and recent tokens included.
        sinks: Number of first tokens that are always kept.
        recent: Number of tokens before the current one that are always kept; the current token is always kept too.
        head_aggregation: Which query heads share a selection (a head group), and how their attention is combined.
            ``head``: every query head selects for itself. ``kv_head``: the query heads of a KV head share a selection,
            by the sum of their attention. With the other values all heads share one selection: by the ``sum`` of their
            attention, by its ``max``, or by ``union``, where every head proposes its top ``budget - recent`` tokens and
            the proposals are ranked by the sum of attention.
        granularity: Select single tokens (``token``, as in the paper), or pages of `PAGE_SIZE` tokens (``page``),
            ranked by the sum of the attention to their tokens.
        candidates: Number of tokens to select from: those of the pages with the largest bounds of their attention; 0
            for all tokens.
        window_size: Number of tokens that window layers read; 0 for the budget.
        full_context: Longest context that is read completely; 0 for the budget.
    """

    budget: int
    sinks: int
    recent: int
    head_aggregation: HeadAggregation
    granularity: Granularity
    candidates: int = 0
    window_size: int = 0
    full_context: int = 0

    @property
    def longest_full_context(self) -> int:
        """Longest context that is read completely; the rule applies to longer ones."""
        return self.full_context or self.budget

    def num_head_groups(self, query_heads: int, kv_heads: int) -> int:
        """Return the number of head groups, each of which has its own selection."""
        return {"head": query_heads, "kv_head": kv_heads}.get(self.head_aggregation, 1)

    @property
    def min_budget(self) -> int:
        """Smallest budget that holds the tokens that are always kept, and one selected token or page."""
        if self.granularity == "token":
            return self.sinks + self.recent + 2
        return PAGE_SIZE * (-(-self.sinks // PAGE_SIZE) + self.recent // PAGE_SIZE + 3)

    @property
    def candidate_rule(self) -> "SelectionRule":
        """Rule by which the candidates of all heads are selected, with pages ranked by their bounds."""
        return replace(self, budget=self.candidates, head_aggregation="max", granularity="page", candidates=0)

    @property
    def window(self) -> "SelectionRule":
        """Rule of window layers, with pages ranked by position: all heads read the first pages and the latest ones."""
        budget = self.window_size or self.budget
        return SelectionRule(budget, self.sinks, 0, "max", "page", full_context=self.longest_full_context)


@dataclass(frozen=True)
class ReadPlan:
    """A plan of what every layer reads in a decode step.

    It applies to requests whose context exceeds the rule's budget. Other requests use full attention in every layer.

    Attributes:
        roles: Role of each layer; layers before the first selection layer compute full attention.
        rule: Rule by which tokens are selected.
        correction_interval: Number of decoded tokens after which their keys and values are recomputed with full
            attention; 0 for never.
        full_selection: Whether selection layers attend to all tokens, instead of those that they select.
    """

    roles: tuple[Role, ...]
    rule: SelectionRule
    correction_interval: int = 0
    full_selection: bool = True

    @property
    def keeps_page_bounds(self) -> bool:
        """Whether a layer selects pages by bounds of their keys, which have to be kept."""
        return Role.PAGE_BOUNDS in self.roles or self.rule.candidates > 0


def unit_positions(units: Sequence[int], context: int, rule: SelectionRule) -> list[int]:
    """Return the positions of selected pages (or of selected tokens) within a context."""
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    return [p for u in units for p in range(u * unit, min(context, (u + 1) * unit))]
