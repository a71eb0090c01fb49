"""KV heads as cache layers of their own, so that the engine gives blocks to each and takes them back from each.

vLLM's block table serves all heads of a layer. Here every KV head is a layer of its own to vLLM's cache manager: heads
that keep everything are full attention with one head; windowed heads have a spec and a manager of ours, which frees
what lies between the sinks and the window at every step. All pages are equally large, so vLLM's own grouping, pool,
admission and preemption serve both.
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
    """The cache of one windowed head.

    Not derived from vLLM's `SlidingWindowSpec`, which it treats as a window without sinks in many places.

    Attributes:
        window: What is kept.
        longest: The longest text that a request may have.
        in_flight: The most tokens that are scheduled before blocks are freed.
    """

    window: HeadWindow
    longest: int
    in_flight: int

    @property
    def prefix_cacheable(self) -> bool:
        """Blocks are freed while a request runs, so that none can be found again."""
        return False

    @property
    def max_blocks(self) -> int:
        """The most blocks that a request holds at any time."""
        return self.window.max_blocks(self.longest, self.in_flight, self.block_size)

    @property
    def max_decode_blocks(self) -> int:
        """The most blocks that a request holds behind its prompt, where it adds a token at a time."""
        return self.window.max_decode_blocks(self.longest, 1, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request, in bytes."""
        del vllm_config
        return self.max_blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: Any) -> bool:
        """Whether one block table could serve all these layers."""
        return all(spec == self for spec in kv_cache_specs.values())


class WindowedHeadManager(SingleTypeKVCacheManager):
    """Gives blocks to windowed heads, and frees those that they dropped."""

    kv_cache_spec: WindowedHeadSpec

    def __init__(self, kv_cache_spec: WindowedHeadSpec, **kwargs: Any) -> None:
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.max_blocks
        super().__init__(kv_cache_spec, **kwargs)
        self.freed = 0  # blocks, while their requests go on

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sinks and what a step behind ``processed_computed_tokens`` reads."""
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
    """Let statistics of a scheduler carry how many blocks were freed since the last ones; see `metrics.take_freed`."""
    make_stats, told = scheduler.make_stats, 0

    def with_freed(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        stats = make_stats(*args, **kwargs)
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        freed = sum(m.freed for m in managers if isinstance(m, WindowedHeadManager))
        if stats is not None and freed > told:
            # The one dictionary in there that reaches the other process whatever it holds.
            stats.num_kv_fetch_reqs_by_stage[metrics.FREED_BLOCKS_KEY + plugin] = freed - told
            told = freed
        return stats

    scheduler.make_stats = with_freed


class HeadLayer(AttentionLayerBase):
    """A layer with the cache of one KV head."""

    def __init__(self, layer: Any, name: str, spec: "HeadSpec") -> None:
        self.layer, self.layer_name, self.spec = layer, name, spec
        self.impl, self.kv_cache = layer.impl, torch.tensor([])

    def get_attn_backend(self) -> Any:
        """The backend of the layer that it came from."""
        return self.layer.attn_backend

    def get_kv_cache_spec(self, vllm_config: Any) -> AttentionSpec:
        """How much of a text it keeps."""
        return self.spec.of(self.layer, vllm_config)


@dataclass(frozen=True)
class HeadSpec:
    """Makes the cache spec of one head; ``window`` None: it keeps everything."""

    window: HeadWindow | None

    def of(self, layer: Any, vllm_config: Any) -> AttentionSpec:
        """The spec; the block size is vLLM's, known when models are loaded."""
        block_size, size, dtype = vllm_config.cache_config.block_size, layer.head_size, layer.kv_cache_torch_dtype
        shared = {
            "block_size": block_size,
            "num_kv_heads": 1,
            "head_size": size,
            "head_size_v": size,
            "dtype": dtype,
            "page_size_padded": block_size * 2 * size * dtype.itemsize + means_bytes(size),
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
    ours: Sequence[Any], layers: dict[str, Any], whole: Sequence[frozenset[int]], window: HeadWindow
) -> list[list[Any]]:
    """Make as many cache layers as there are KV heads; an attention layer is one of them itself.

    vLLM wants the same cache layers on all tensor-parallel ranks, whose heads differ. So the first cache layers keep
    everything, as many as there are such heads, whichever heads of whichever layers these are.

    Args:
        ours: vLLM's attention layers.
        layers: vLLM's layers by name, to which ours are added.
        whole: For each attention layer, KV heads that keep everything.
        window: Of the others.

    Returns:
        For each attention layer and KV head the cache layer whose ``kv_cache`` is its own.
    """
    kept = sum(map(len, whole))
    slots: list[Any] = []
    for layer in ours:
        for head in range(layer.num_kv_heads):
            spec = HeadSpec(None if len(slots) < kept else window)
            if head == 0:
                layer.get_kv_cache_spec = functools.partial(spec.of, layer)
                slots.append(layer)
            else:
                name = f"{layer.layer_name}.head{head}"
                layers[name] = HeadLayer(layer, name, spec)
                slots.append(layers[name])
    keep, leave = iter(slots[:kept]), iter(slots[kept:])
    return [
        [next(keep if head in heads else leave) for head in range(layer.num_kv_heads)]
        for layer, heads in zip(ours, whole, strict=True)
    ]


def max_concurrency(kv_cache_config: Any, vllm_config: Any) -> float | None:
    """How many requests of the longest length fit together: one reads its prompt while all others decode.

    None when no head is windowed, and vLLM's own figure holds.
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
        found = max_concurrency(kv_cache_config, vllm_config)
        return original(vllm_config, kv_cache_config) if found is None else found

    return get_max_concurrency_for_kv_cache_config


CAPACITY = Patch("vllm.v1.core.kv_cache_utils", "get_max_concurrency_for_kv_cache_config", _capacity)


# When this module is imported, which every process does that makes such a spec or reads one from another process.
KVCacheSpecRegistry._ensure_registered()  # or ours would hide the built-in ones
KVCacheSpecRegistry.register(
    WindowedHeadSpec, manager_class=WindowedHeadManager, uniform_type_base_spec=WindowedHeadSpec
)
CAPACITY.apply()
