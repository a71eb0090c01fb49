"""Sparse attention on vLLM's FlashAttention backend; see `triton`.

FlashAttention's schedule is computed once per step for full block tables. In sparse layers the kernel schedules the
shortened ones itself, on the device, so that decode steps can be captured in full CUDA graphs.
"""

from typing import ClassVar

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .page_bounds_triton import PageBoundsGPUImpl
from .triton import SparseGPUImpl, SparseGPUMetadataBuilder


class SparseFlashImpl(SparseGPUImpl, FlashAttentionImpl):
    """Attention implementation of one layer, on ``FLASH_ATTN``."""


class SparseFlashMetadataBuilder(SparseGPUMetadataBuilder, FlashAttentionMetadataBuilder):
    """Metadata builder on ``FLASH_ATTN``."""

    over: ClassVar[str] = "FLASH_ATTN"
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


class SparseFlashBackend(FlashAttentionBackend):
    """Subclass of ``FLASH_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return the class of the attention implementation."""
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Return the class of the metadata builder."""
        return SparseFlashMetadataBuilder


class PageBoundsFlashImpl(PageBoundsGPUImpl, SparseFlashImpl):
    """Attention implementation of one layer that keeps bounds of its pages."""


class PageBoundsFlashBackend(SparseFlashBackend):
    """Sparse backend whose selection layers keep bounds of their pages, to select among candidates."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return the class of the attention implementation."""
        return PageBoundsFlashImpl
