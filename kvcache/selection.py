"""Which positions of a context a decode step reads: what layers do, and how positions are chosen.

Values only; `kernels.paged_decode` does the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

PAGE_SIZE = 32  # tokens of a page, and of one unit of work in the kernels

HeadAggregation = Literal["head", "kv_head", "sum", "max", "union"]
Granularity = Literal["token", "page"]


class Role(Enum):
    """What a layer does in a decode step."""

    FULL = "attends to everything"
    SELECT = "attends to everything and chooses positions"
    SPARSE = "attends to the chosen positions"


@dataclass(frozen=True)
class SelectionRule:
    """How positions are chosen from the attention of one layer.

    Attributes:
        budget: Positions that are kept, all told.
        sinks: First positions of the text, always kept.
        recent: Positions before the current one that are always kept, besides the current one.
        head_aggregation: Who shares a choice. ``head``: every query head its own. ``kv_head``: the query heads of a KV
            head, by the sum of their attention. Else all heads: by the ``sum`` of attention, its ``max``, or ``union``:
            every head proposes ``budget - recent`` positions, and the proposals are ranked by the sum of attention.
        granularity: Single positions (the paper), or pages of `GROUP` positions ranked by their sum.
    """

    budget: int
    sinks: int
    recent: int
    head_aggregation: HeadAggregation
    granularity: Granularity

    def num_head_groups(self, query_heads: int, kv_heads: int) -> int:
        """How many choices a layer makes for each request."""
        return {"head": query_heads, "kv_head": kv_heads}.get(self.head_aggregation, 1)

    @property
    def min_budget(self) -> int:
        """The smallest budget that holds what is always kept, and one unit to choose."""
        if self.granularity == "token":
            return self.sinks + self.recent + 2
        return PAGE_SIZE * (-(-self.sinks // PAGE_SIZE) + self.recent // PAGE_SIZE + 3)


@dataclass(frozen=True)
class ReadPlan:
    """What every layer reads in a decode step whose context exceeds the rule's budget.

    Attributes:
        roles: One for each layer; layers before the first choice, and requests within the budget, read everything.
        rule: How positions are chosen.
        correction_interval: Decoded tokens after which their keys and values are computed anew with full attention;
            0 for never.
    """

    roles: tuple[Role, ...]
    rule: SelectionRule
    correction_interval: int = 0


def unit_positions(units: Sequence[int], context: int, rule: SelectionRule) -> list[int]:
    """Return the positions of selected pages (or of selected tokens) within a context."""
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    return [p for u in units for p in range(u * unit, min(context, (u + 1) * unit))]
