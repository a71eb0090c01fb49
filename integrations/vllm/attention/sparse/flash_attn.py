"""FlashAttention with layers that read the positions which an earlier layer chose; see `sparse_cuda`.

Its schedule is made ahead for whole block tables, and a captured graph could not shorten them: graphs are piecewise.
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
    """Over ``FLASH_ATTN``."""


class SparseFlashMetadataBuilder(SparseGPUMetadataBuilder, FlashAttentionMetadataBuilder):
    """Over ``FLASH_ATTN``."""

    over: ClassVar[str] = "FLASH_ATTN"
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER


class SparseFlashBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with our metadata and our forward."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention of a layer."""
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """What builds the metadata of a step."""
        return SparseFlashMetadataBuilder
