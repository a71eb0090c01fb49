"""KV heads as separate cache layers, so that the engine allocates and frees blocks per head.

vLLM's block table serves all heads of a layer. Here vLLM's cache manager treats every KV head as a layer: retrieval
heads use vLLM's full-attention spec with one head; non-retrieval heads use our spec and manager, which frees the blocks
between the sinks and the window at every step. All pages have the same size, so vLLM's grouping, block pool, admission
and preemption serve both.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .....kvcache.head_window import HeadWindow
from .....kvcache.kernels.head_cache import means_bytes
from ...engine import metrics
from ...engine.patching import Patch


@dataclass(frozen=True, kw_only=True)
class WindowedHeadSpec(AttentionSpec):
    """KV cache spec of one non-retrieval head.

    It is not derived from vLLM's `SlidingWindowSpec`, which vLLM treats as a window without sinks in many places.

    Attributes:
        window: Sinks and window that the head keeps.
        longest: Maximum number of tokens of a request.
        in_flight: Maximum number of tokens that are scheduled before blocks are freed.
    """

    window: HeadWindow
    longest: int
    in_flight: int

    @property
    def prefix_cacheable(self) -> bool:
        """Return False: blocks are freed while a request runs, so the prefix cache cannot find them."""
        return False

    @property
    def max_blocks(self) -> int:
        """Maximum number of blocks that a request holds at any time."""
        return self.window.max_blocks(self.longest, self.in_flight, self.block_size)

    @property
    def max_decode_blocks(self) -> int:
        """Maximum number of blocks that a request holds after its prompt, while it decodes one token per step."""
        return self.window.max_decode_blocks(self.longest, 1, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the maximum memory usage of one request in bytes."""
        del vllm_config
        return self.max_blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: Any) -> bool:
        """Return whether one block table can serve all these layers."""
        return all(spec == self for spec in kv_cache_specs.values())


class WindowedHeadManager(SingleTypeKVCacheManager):
    """KV cache manager of non-retrieval heads, which allocates their blocks and frees evicted ones.

    Attributes:
        freed: Number of blocks freed while their requests were running.
    """

    kv_cache_spec: WindowedHeadSpec

    def __init__(self, kv_cache_spec: WindowedHeadSpec, **kwargs: Any) -> None:
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.max_blocks
        super().__init__(kv_cache_spec, **kwargs)
        self.freed = 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sinks and the first block that the next step reads."""
        window = self.kv_cache_spec.window
        in_prompt = num_prompt_tokens is not None and processed_computed_tokens < num_prompt_tokens
        first = window.first_retained_block(processed_computed_tokens, self.block_size, in_prompt)
        free = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, window.sink_blocks(self.block_size), first)
        self.freed += self.block_pool.get_num_free_blocks() - free

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        del block_hashes, max_length, args, kwargs
        return tuple([] for _ in kv_cache_group_ids), 0


def report_freed(scheduler: Any, plugin: str) -> None:
    """Add the number of blocks freed since the last report to the statistics of a scheduler.

    `metrics.record_freed_blocks` reads it from there.

    Args:
        scheduler: vLLM's scheduler, of which `make_stats` is wrapped.
        plugin: Name of the KV policy.
    """
    make_stats, reported = scheduler.make_stats, 0

    def with_freed(*args: Any, **kwargs: Any) -> Any:
        nonlocal reported
        stats = make_stats(*args, **kwargs)
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        freed = sum(m.freed for m in managers if isinstance(m, WindowedHeadManager))
        if stats is not None and freed > reported:
            # The only field of the statistics whose keys are passed to the front-end process unchecked.
            stats.num_kv_fetch_reqs_by_stage[metrics.FREED_BLOCKS_KEY + plugin] = freed - reported
            reported = freed
        return stats

    scheduler.make_stats = with_freed


class HeadLayer(AttentionLayerBase):
    """Cache layer of one KV head.

    Args:
        layer: vLLM's attention layer.
        name: Name of the cache layer.
        spec: Factory of the cache spec.
    """

    def __init__(self, layer: Any, name: str, spec: "HeadSpec") -> None:
        self.layer, self.layer_name, self.spec = layer, name, spec
        self.impl, self.kv_cache = layer.impl, torch.tensor([])

    def get_attn_backend(self) -> Any:
        """Return the attention backend of the attention layer."""
        return self.layer.attn_backend

    def get_kv_cache_spec(self, vllm_config: Any) -> AttentionSpec:
        """Return the cache spec of the head."""
        return self.spec.of(self.layer, vllm_config)


@dataclass(frozen=True)
class HeadSpec:
    """Factory of the cache spec of one head.

    Attributes:
        window: Sinks and window of a non-retrieval head; None for a retrieval head, which keeps all tokens.
    """

    window: HeadWindow | None

    def of(self, layer: Any, vllm_config: Any) -> AttentionSpec:
        """Return the cache spec for a head of ``layer``; vLLM's block size is known once the model is loaded."""
        block_size, head_size, dtype = vllm_config.cache_config.block_size, layer.head_size, layer.kv_cache_torch_dtype
        shared = {
            "block_size": block_size,
            "num_kv_heads": 1,
            "head_size": head_size,
            "head_size_v": head_size,
            "dtype": dtype,
            "page_size_padded": block_size * 2 * head_size * dtype.itemsize + means_bytes(head_size),
        }
        if self.window is None:
            return FullAttentionSpec(**shared)
        return WindowedHeadSpec(
            **shared,
            window=self.window,
            longest=vllm_config.model_config.max_model_len,
            in_flight=vllm_config.max_in_flight_tokens,
        )


def split_into_heads(
    ours: Sequence[Any], layers: dict[str, Any], retrieval_heads: Sequence[frozenset[int]], window: HeadWindow
) -> list[list[Any]]:
    """Create one cache layer per KV head; an attention layer is the cache layer of its first head.

    vLLM requires the same cache layers on all tensor-parallel ranks, but retrieval heads differ between ranks.
    Therefore the first cache layers, as many as there are retrieval heads, get the full-attention spec, and each head
    is assigned a cache layer with a suitable spec, possibly of another attention layer.

    Args:
        ours: vLLM's attention layers.
        layers: vLLM's layers by name; new cache layers are added.
        retrieval_heads: Retrieval heads of each attention layer.
        window: Sinks and window of the other heads.

    Returns:
        Cache layer of each KV head, for each attention layer.
    """
    num_retrieval = sum(map(len, retrieval_heads))
    slots: list[Any] = []
    for layer in ours:
        for head in range(layer.num_kv_heads):
            spec = HeadSpec(None if len(slots) < num_retrieval else window)
            if head == 0:
                layer.get_kv_cache_spec = functools.partial(spec.of, layer)
                slots.append(layer)
            else:
                name = f"{layer.layer_name}.head{head}"
                layers[name] = HeadLayer(layer, name, spec)
                slots.append(layers[name])
    full, windowed = iter(slots[:num_retrieval]), iter(slots[num_retrieval:])
    return [
        [next(full if head in heads else windowed) for head in range(layer.num_kv_heads)]
        for layer, heads in zip(ours, retrieval_heads, strict=True)
    ]


def max_concurrency(kv_cache_config: Any, vllm_config: Any) -> float | None:
    """Estimate how many requests of maximum length fit at the same time, one in its prompt and all others decoding.

    Return None if no head is windowed, so that vLLM's estimate applies.
    """
    peak = steady = 0
    windowed = False
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        blocks = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        peak += blocks
        if isinstance(spec, WindowedHeadSpec):
            windowed = True
            steady += spec.max_decode_blocks
        else:
            steady += blocks
    if not windowed:
        return None
    blocks = kv_cache_config.num_blocks
    return blocks / peak if blocks < peak else 1 + (blocks - peak) / steady


def _capacity(original: Any) -> Any:
    def get_max_concurrency_for_kv_cache_config(vllm_config: Any, kv_cache_config: Any) -> float:
        concurrency = max_concurrency(kv_cache_config, vllm_config)
        return original(vllm_config, kv_cache_config) if concurrency is None else concurrency

    return get_max_concurrency_for_kv_cache_config


CAPACITY = Patch("vllm.v1.core.kv_cache_utils", "get_max_concurrency_for_kv_cache_config", _capacity)


# Runs on import: every process that creates or unpickles our spec imports this module.
KVCacheSpecRegistry._ensure_registered()  # otherwise our entry would prevent the registration of vLLM's specs
KVCacheSpecRegistry.register(
    WindowedHeadSpec, manager_class=WindowedHeadManager, uniform_type_base_spec=WindowedHeadSpec
)
CAPACITY.apply()
