"""Sparse attention on vLLM's CPU backend for layers that select pages, or candidates, by bounds of their keys."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from .....kvcache.kernels import page_bounds, paged_decode
from .....kvcache.kernels.paged_decode import DecodeBatch, SelectedTokens
from .....kvcache.selection import PAGE_SIZE, Role, SelectionRule
from .common import PageBoundsMixin, reduce_over_ranks
from .cpu import LOGITS_BYTES, SparseCPUBackend, SparseCPUImpl, SparseCPUStep


class PageBoundsCPUBackend(SparseCPUBackend):
    """Sparse backend whose layers keep bounds of their pages."""

    @staticmethod
    def get_impl_cls() -> type["PageBoundsCPUImpl"]:
        """Return the class of the attention implementation."""
        return PageBoundsCPUImpl


class PageBoundsCPUImpl(PageBoundsMixin, SparseCPUImpl):
    """Attention implementation of one layer."""

    bounds_kernels: ClassVar[Any] = page_bounds

    def _decode(
        self,
        role: Role,
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        step: SparseCPUStep,
    ) -> None:
        if role is not Role.PAGE_BOUNDS:
            super()._decode(role, query, cache, table, output, step)
            return
        for rows in step.rows.parts(LOGITS_BYTES, step.rows.padded // PAGE_SIZE):
            pages = self._best_pages(query, cache, table, rows, step.plan.rule)
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, pages)

    def _parts(self, step: SparseCPUStep) -> Iterator[DecodeBatch]:
        rows, rule = step.rows, step.plan.rule
        if not rule.candidates or step.observe is not None:
            return super()._parts(step)
        # Logits are those of pages, and then those of the candidates.
        return rows.parts(LOGITS_BYTES, max(rows.padded // PAGE_SIZE, min(rule.candidates, rows.padded)))

    def _select(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor | None,
        step: SparseCPUStep,
        rows: DecodeBatch,
    ) -> SelectedTokens:
        rule = step.plan.rule
        if not rule.candidates or step.observe is not None:
            return super()._select(query, cache, table, output, step, rows)
        candidates = self._best_pages(query, cache, table, rows, rule.candidate_rule)
        logits = torch.empty(rows.count, rows.query_heads, candidates.pages.shape[2] * PAGE_SIZE)
        read = candidates if output is None else None
        paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, read, logits, candidates)
        return paged_decode.select_among(candidates, rows, rule, self.num_kv_heads, logits, reduce_over_ranks)

    def _best_pages(
        self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, rows: DecodeBatch, rule: SelectionRule
    ) -> SelectedTokens:
        """Select the pages with the largest bounds of their attention."""
        logits = page_bounds.bound_logits(query, cache, self.bounds_of(cache), table, rows, self.scale)
        return page_bounds.select_pages(rows, rule, self.num_kv_heads, logits, reduce_over_ranks)
