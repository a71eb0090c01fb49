"""Tree attention on vLLM's V2 model runner, where only the device knows the draft trees of a step.

It is that of `triton`, with the trees at fixed addresses. So full CUDA graphs of decode steps contain it.
"""

import copy
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from .....kvcache.kernels.device_tree_triton import DeviceTrees
from . import common
from .triton import TreeTritonImpl, self_test_tree_triton


class DeviceTreeBackend(TritonAttentionBackend):
    """Subclass of ``TRITON_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonImpl]:
        """Return the class of the attention implementation."""
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type["DeviceTreeMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return DeviceTreeMetadataBuilder


class DeviceTreeMetadataBuilder(TritonAttentionMetadataBuilder):
    """Metadata builder that adds the draft trees of a step.

    Attributes:
        trees: The draft trees of all requests; set by `drafting.v2.tree_verification` before the first step.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.trees: DeviceTrees | None = None
        common.check_tree_layers(vllm_config, common.attention_layers(vllm_config, layer_names))
        if isinstance(kv_cache_spec, ChunkedLocalAttentionSpec):
            raise common.no_trees(vllm_config, "chunked local attention splits requests into several")
        error = self_test_tree_triton(kv_cache_spec.head_size, vllm_config.model_config.dtype, self.block_size, device)
        if error is not None:
            raise common.no_trees(vllm_config, error)
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._short_seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Build the metadata of a step without trees, with the number of rows that each request of the graph has."""
        if self.trees is not None:
            self.trees.clear(common_attn_metadata.max_query_len)
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build vLLM's metadata, extended by our part of the step."""
        stock: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        stock.trees = stock.others = None
        if self.trees is not None:
            count = len(stock.seq_lens)
            stock.trees = trees = self.trees.view(count)
            # vLLM's kernel does little work for requests with a tree, and ours overwrites its output.
            stock.others = copy.copy(stock)
            stock.others.seq_lens = short = self._short_seq_lens[:count]
            torch.where(trees.numbers[:, 3] > 0, trees.numbers[:, 3], stock.seq_lens, out=short)
        return stock
