"""Attention over KV heads with separate caches on vLLM's Triton backend; see `common`."""

import copy
import functools
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from .....kvcache.head_window import HeadWindow
from .....kvcache.kernels.head_cache_triton import TritonHeadCaches, TritonWindowedStep
from . import common, prompt_lengths


class WindowedTritonImpl(common.WindowedImpl, TritonAttentionImpl):
    """Attention implementation of one layer."""

    over: ClassVar[str] = "TRITON_ATTN"
    head_caches: ClassVar[type] = TritonHeadCaches


class WindowedTritonBackend(TritonAttentionBackend):
    """Subclass of ``TRITON_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type[WindowedTritonImpl]:
        """Return the class of the attention implementation."""
        return WindowedTritonImpl

    @staticmethod
    def get_builder_cls() -> type["WindowedTritonMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return WindowedTritonMetadataBuilder


class WindowedTritonMetadataBuilder(TritonAttentionMetadataBuilder):
    """Metadata builder that adds the lengths of prompts; the kernels read all else on the device."""

    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self.window: HeadWindow = impl.plan.window
        shape = impl.num_queries_per_kv, kv_cache_spec.head_size, self.block_size
        test = functools.partial(self_test_windowed_triton, kv_cache_spec.dtype, *shape, device)
        common.check_kernels(impl, test, vllm_config.model_config.model)
        self._prompt_lens = prompt_lens_buffer(vllm_config.scheduler_config.max_num_seqs, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build vLLM's metadata, extended by our part of the step."""
        stock: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        requests, known = len(stock.seq_lens), common_attn_metadata.is_prefilling
        prompt_lens = self._prompt_lens[:requests]
        prompt_lens.copy_(prompt_lengths.prompt_lens_of_step(known, requests), non_blocking=True)
        stock.step = TritonWindowedStep(
            stock.query_start_loc, stock.seq_lens, prompt_lens, stock.max_query_len, stock.max_seq_len
        )
        longest = stock.max_seq_len
        stock.windowed = longest if self.window.num_evicted(longest - 1, self.block_size) else 0
        return stock

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Build the metadata for CUDA graph capture, whose dummy requests are not a first windowed step."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        metadata.windowed = 0
        return metadata

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """Build the metadata of the same step for the blocks of another group of heads."""
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = blk_table, slot_mapping
        return updated


@functools.cache
def prompt_lens_buffer(requests: int, device: torch.device) -> torch.Tensor:
    """Return the buffer for the prompt lengths of a step, [requests] int32, which all CUDA graphs read."""
    return torch.zeros(requests, dtype=torch.int32, device=device)


@functools.cache
def self_test_windowed_triton(
    dtype: torch.dtype, num_queries_per_kv: int, head_size: int, block_size: int, device: torch.device
) -> str | None:
    """Run `common.self_test_windowed` with the Triton kernels; return an error message, or None."""

    def make_step(begin: int, end: int, window: HeadWindow) -> TritonWindowedStep:
        del window  # `TritonHeadCaches` passes it to the kernels
        starts, lens, prompt_lens = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, end - begin], [end], [0])
        )
        return TritonWindowedStep(starts, lens, prompt_lens, end - begin, end)

    return common.self_test_windowed(
        TritonHeadCaches, make_step, dtype, num_queries_per_kv, head_size, block_size, device
    )
