"""Metadata builder for CPU steps in which our kernels serve some requests and vLLM's kernel the others."""

from dataclasses import replace
from typing import Any

from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

ISA = "vec"  # cache layout that our kernels read; vLLM's default on x86 without AMX


class SplitBuilder(CPUAttentionMetadataBuilder):
    """Metadata builder of vLLM's CPU backend that uses the cache layout of our kernels."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.isa == "amx":
            self.isa = ISA
            self._set_isa_to_layers(layer_names)

    def without(self, stock: CPUAttentionMetadata, requests: list[int]) -> CPUAttentionMetadata:
        """Return metadata in which ``requests`` are cut to their query tokens.

        vLLM's kernel then does almost no work for these requests, whose output our kernel overwrites.

        Args:
            stock: vLLM's metadata of the step.
            requests: Indices of the requests in the batch.
        """
        seq_lens = stock.seq_lens.clone()
        seq_lens[requests] = stock.query_start_loc.diff()[requests]
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=stock.query_start_loc,
            causal=stock.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=stock.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return replace(stock, seq_lens=seq_lens, scheduler_metadata=schedule)
