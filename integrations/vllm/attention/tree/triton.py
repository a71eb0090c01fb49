"""Tree attention on vLLM's Triton backend: for requests whose query tokens form a draft tree; see `cpu`.

It also replaces ``FLASH_ATTN``. Full CUDA graphs cannot contain the trees of a step, so CUDA graphs are piecewise.
"""

import copy
import functools
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from .....kvcache.kernels.tree_triton import TritonKVMover, TritonTreeBatch, tree_attention
from .....plugins.drafting.tree import tree_attention_mask
from . import common


class TreeTritonBackend(TritonAttentionBackend):
    """Subclass of ``TRITON_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type["TreeTritonImpl"]:
        """Return the class of the attention implementation."""
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type["TreeTritonMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return TreeTritonMetadataBuilder


class TreeTritonMetadataBuilder(common.TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    """Metadata builder that adds the draft trees of a step and moves the KV of accepted tokens."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    mover: ClassVar[type] = TritonKVMover

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.error = self_test_tree_triton(
            kv_cache_spec.head_size, vllm_config.model_config.dtype, self.block_size, device
        )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build vLLM's metadata, extended by our part of the step."""
        stock: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        stock.trees = stock.others = None
        if self.scheduled_trees:
            trees = self.tree_batch_arguments(stock.slot_mapping)
            stock.trees = TritonTreeBatch(*trees, stock.seq_lens.device)
            if len(self.scheduled_trees) < common_attn_metadata.num_reqs:
                # vLLM's kernel does little work for these requests, and ours overwrites its output.
                stock.others = copy.copy(stock)
                stock.others.seq_lens = stock.seq_lens.clone()
                stock.others.seq_lens[trees[0]] = stock.query_start_loc.diff()[trees[0]]
        return stock


class TreeTritonImpl(common.TreeImpl, TritonAttentionImpl):
    """Attention implementation of one layer."""

    tree_attention = staticmethod(tree_attention)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Return False: our kernel does not quantise its output."""
        del quant_key
        return False


@functools.cache
def self_test_tree_triton(head_size: int, dtype: torch.dtype, block_size: int, device: torch.device) -> str | None:
    """Compare attention of a tree on a small cache with reference attention.

    Returns:
        An error message, or None if they agree.
    """
    generator = torch.Generator().manual_seed(0)
    parents = np.array([-1, 0, -1, 2, 3, 1, 4], np.int32)
    rows, before, mask = len(parents) + 1, block_size - 3, tree_attention_mask(parents)
    query, cache = (
        torch.randn(shape, generator=generator).to(dtype).to(device)
        for shape in ((rows, 4, head_size), (3, 2, block_size, 2 * head_size))
    )
    cache = cache.transpose(1, 2).contiguous().transpose(1, 2)  # token-major (NHD), vLLM's default layout
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    output, scale = torch.zeros_like(query), head_size**-0.5
    tree_attention(query, cache, table, TritonTreeBatch([0], [0], [before + 1], [mask], device), scale, output)
    text = cache[table[0].long()].transpose(1, 2).reshape(-1, 2, 2 * head_size).double().cpu().numpy()
    worst = common.max_error(query, output, text[..., :head_size], text[..., head_size:], before, mask)
    return None if worst < 0.03 else f"the kernels misread the cache (self-test: off by {worst:.3g})"
