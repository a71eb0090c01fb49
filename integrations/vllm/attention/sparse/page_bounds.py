"""Sparse attention on vLLM's CPU backend for layers that select pages, or candidates, by bounds of their keys.

Each of these layers stores the bounds in a separate tensor and updates them with every write to its KV cache. So prefix
caching, preemption and chunked prefill need no further code.
"""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config

from .....kvcache.kernels import page_bounds, paged_decode
from .....kvcache.kernels.paged_decode import DecodeBatch, SelectedTokens
from .....kvcache.selection import PAGE_SIZE, Role, SelectionRule
from ...engine.selection import kv_policy
from .common import reduce_over_ranks
from .cpu import LOGITS_BYTES, SparseCPUBackend, SparseCPUImpl, SparseCPUStep


class PageBoundsCPUBackend(SparseCPUBackend):
    """Sparse backend whose layers keep bounds of their pages."""

    @staticmethod
    def get_impl_cls() -> type["PageBoundsCPUImpl"]:
        """Return the class of the attention implementation."""
        return PageBoundsCPUImpl


class PageBoundsCPUImpl(SparseCPUImpl):
    """Attention implementation of one layer."""

    _bounds: torch.Tensor | None = None
    _address = 0  # of the cache to which the bounds belong

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy = kv_policy(get_current_vllm_config())
        plan = policy and policy.read_plan()
        assert plan is not None
        self._first_plan = plan

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the cache, and update the bounds of their pages."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.role(layer, self._first_plan) in (Role.PAGE_BOUNDS, Role.SELECT):
            page_bounds.update_bounds(kv_cache, self._bounds_of(kv_cache), slot_mapping[: len(key)])

    def _bounds_of(self, cache: torch.Tensor) -> torch.Tensor:
        if self._bounds is None or cache.data_ptr() != self._address:
            self._bounds, self._address = page_bounds.zero_bounds(cache), cache.data_ptr()
        return self._bounds

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
        return rows.parts(LOGITS_BYTES, max(rows.padded // PAGE_SIZE, rule.candidates))

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
        candidates = self._best_pages(query, cache, table, rows, rule.of_candidates)
        logits = torch.empty(rows.count, rows.query_heads, candidates.pages.shape[2] * PAGE_SIZE)
        read = candidates if output is None else None
        paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, read, logits, candidates)
        return paged_decode.select_among(candidates, rows, rule, self.num_kv_heads, logits, reduce_over_ranks)

    def _best_pages(
        self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, rows: DecodeBatch, rule: SelectionRule
    ) -> SelectedTokens:
        """Select the pages with the largest bounds of their attention."""
        logits = page_bounds.bound_logits(query, cache, self._bounds_of(cache), table, rows, self.scale)
        return page_bounds.select_pages(rows, rule, self.num_kv_heads, logits, reduce_over_ranks)
