"""Attention over KV heads with separate caches on vLLM's CPU backend; see `common`."""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from .....kvcache.head_window import HeadWindow
from .....kvcache.kernels.head_cache import CPUHeadCaches, WindowedStep
from . import common, prompt_lengths


@dataclass
class WindowedMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a group of heads, extended by the part of the step that all groups share.

    Attributes:
        step: Query tokens of the step, and the number of tokens that each skips in non-retrieval heads.
        windowed: Longest context of the step if tokens are skipped, else 0.
    """

    step: WindowedStep | None = None
    windowed: int = 0


class WindowedCPUImpl(common.WindowedImpl, CPUAttentionBackendImpl):
    """Attention implementation of one layer."""

    over: ClassVar[str] = "CPU_ATTN"
    head_caches: ClassVar[type] = CPUHeadCaches


class WindowedCPUBackend(CPUAttentionBackend):
    """Subclass of ``CPU_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type[WindowedCPUImpl]:
        """Return the class of the attention implementation."""
        return WindowedCPUImpl

    @staticmethod
    def get_builder_cls() -> type["WindowedCPUMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return WindowedCPUMetadataBuilder


class WindowedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Metadata builder that computes how many tokens non-retrieval heads skip in a step."""

    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self.query_heads = impl.num_heads  # of all KV heads of the layer
        self.num_heads = impl.num_queries_per_kv  # of one KV head, which is a cache layer here
        self.window: HeadWindow = impl.plan.window
        test = functools.partial(self_test_windowed_cpu, self.dtype, self.num_heads, self.head_dim, self.block_size)
        common.check_kernels(impl, test, vllm_config.model_config.model)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> WindowedMetadata:
        """Build vLLM's metadata, extended by our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        ends = stock.seq_lens.tolist()
        prompt_lens = prompt_lengths.prompt_lens_of_step(common_attn_metadata.is_prefilling, len(ends)).tolist()
        lengths = common_attn_metadata.query_start_loc_cpu.diff().tolist()
        begins = [end - length for end, length in zip(ends, lengths, strict=True)]

        def num_evicted(request: int, position: int) -> int:
            return self.window.num_evicted(position, self.block_size, in_prompt=position < prompt_lens[request])

        step = WindowedStep(begins, ends, num_evicted, self.query_heads)
        return WindowedMetadata(**vars(stock), step=step, windowed=stock.max_seq_len if step.gaps.any() else 0)

    def update_block_table(
        self, metadata: WindowedMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> WindowedMetadata:
        """Build the metadata of the same step for the blocks of another group of heads."""
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


@functools.cache
def self_test_windowed_cpu(dtype: torch.dtype, num_queries_per_kv: int, head_size: int, block_size: int) -> str | None:
    """Run `common.self_test_windowed` with the CPU kernels; return an error message, or None."""

    def make_step(begin: int, end: int, window: HeadWindow) -> WindowedStep:
        return WindowedStep([begin], [end], lambda _, n: window.num_evicted(n, block_size), num_queries_per_kv)

    return common.self_test_windowed(CPUHeadCaches, make_step, dtype, num_queries_per_kv, head_size, block_size, "cpu")
