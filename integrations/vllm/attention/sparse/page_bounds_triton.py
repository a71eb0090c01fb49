"""Sparse attention on vLLM's GPU backends for layers that select among candidates, by bounds of their pages."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from .....kvcache.kernels import page_bounds_triton
from .common import PageBoundsMixin
from .triton import SparseGPUImpl, SparseGPUStep, SparseTritonBackend, SparseTritonImpl


class PageBoundsGPUImpl(PageBoundsMixin, SparseGPUImpl):
    """Mixin for the attention implementation of one layer that keeps bounds of its pages."""

    bounds_kernels: ClassVar[Any] = page_bounds_triton

    def _candidate_bounds(self, cache: torch.Tensor, step: SparseGPUStep) -> torch.Tensor | None:
        return self.bounds_of(cache) if step.plan.rule.candidates else None


class PageBoundsTritonImpl(PageBoundsGPUImpl, SparseTritonImpl):
    """Attention implementation of one layer, on ``TRITON_ATTN``."""


class PageBoundsTritonBackend(SparseTritonBackend):
    """Sparse backend on ``TRITON_ATTN`` whose selection layers keep bounds of their pages."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """Return the class of the attention implementation."""
        return PageBoundsTritonImpl
