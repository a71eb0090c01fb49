"""Steps of vLLM's CPU attention backend of which our kernels serve some requests, and vLLM's the others."""

from dataclasses import replace
from typing import Any

from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

ISA = "vec"  # the cache layout that our kernels read; vLLM's own choice on x86 without AMX


class SplitBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, over the cache layout of our kernels."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.isa == "amx":
            self.isa = ISA
            self._set_isa_to_layers(layer_names)

    def without(self, stock: CPUAttentionMetadata, requests: list[int]) -> CPUAttentionMetadata:
        """Metadata by which vLLM's kernel spends next to nothing on ``requests``, whose output ours overwrites.

        They are cut to their query tokens.
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
