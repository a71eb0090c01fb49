"""Sparse attention on vLLM's CPU backend for layers that select pages by bounds of their keys.

Each layer stores the bounds in a separate tensor and updates them with every write to its KV cache. So prefix caching,
preemption and chunked prefill need no further code.
"""

from typing import Any

import torch

from .....kvcache.kernels import page_bounds, paged_decode
from .....kvcache.selection import Role
from .common import reduce_over_ranks
from .cpu import SparseCPUBackend, SparseCPUImpl, SparseCPUStep


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

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the cache, and update the bounds of their pages."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
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
        rows, rule = step.rows, step.plan.rule
        logits = page_bounds.bound_logits(query, cache, self._bounds_of(cache), table, rows, self.scale)
        choice = page_bounds.select_pages(rows, rule, self.num_kv_heads, logits, reduce_over_ranks)
        paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, choice)
