"""Sparse attention on vLLM's FlashAttention backend; see `triton`.

FlashAttention's schedule is computed in advance for full block tables, and a captured CUDA graph could not shorten
them. Therefore CUDA graphs are piecewise.
"""

from typing import ClassVar

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .triton import SparseGPUImpl, SparseGPUMetadataBuilder


class SparseFlashImpl(SparseGPUImpl, FlashAttentionImpl):
    """Attention implementation of one layer, on ``FLASH_ATTN``."""


class SparseFlashMetadataBuilder(SparseGPUMetadataBuilder, FlashAttentionMetadataBuilder):
    """Metadata builder on ``FLASH_ATTN``."""

    over: ClassVar[str] = "FLASH_ATTN"
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER


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
