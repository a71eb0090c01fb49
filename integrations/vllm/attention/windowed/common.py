"""Attention over KV heads with separate caches, most of which keep only a window; shared by all platforms.

Keys and values are written and read by our kernels, with a few calls per layer for all its heads. The tokens that a
step skips follow from the lengths of its requests alone, by the same formula as in the cache manager, so that the two
agree without communication.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index

from .....kvcache.head_window import HeadPlan, HeadWindow
from .....kvcache.kernels.head_cache import means_bytes
from .....plugins.contracts import KVPolicy, Unsupported
from .....plugins.razor_attention import RazorAttention
from ...engine import log
from ...engine.selection import attach
from .. import compatibility
from ..compatibility import LogWhenActive, has_sliding_window, unsupported_features
from . import kv_cache_spec, prompt_lengths


class WindowedImpl:
    """Mixin for the attention implementation of one layer; vLLM's has to follow it in the bases.

    Attributes:
        over: Name of vLLM's backend.
        head_caches: Class of this platform's kernels.
        policy: Name of the KV policy.
        plan: Head plan of this rank.
    """

    over: ClassVar[str]
    head_caches: ClassVar[type]
    policy: str
    plan: HeadPlan
    _announce: LogWhenActive
    _retrieval_heads: frozenset[int]  # KV heads that keep all tokens
    _heads: Sequence[Any] = ()  # cache layers, one for each KV head
    _caches: Any = None
    _places: Sequence[int] = ()  # addresses of the caches in `_caches`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Return False: our kernel does not quantise its output."""
        del quant_key
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Return False: our kernel stores keys that are already rotated."""
        return False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split the layer into KV heads; called after the model is loaded, before the engine asks for cache specs."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if not self._heads:  # the first layer splits all of them; reloading weights has no effect
            split_layers_into_heads(self._vllm_config)

    def use(
        self, heads: Sequence[Any], retrieval_heads: frozenset[int], plan: HeadPlan, announce: LogWhenActive
    ) -> None:
        """Set the cache layers of this layer.

        Args:
            heads: Cache layer of each KV head.
            retrieval_heads: Retrieval heads, which keep all tokens.
            plan: Head plan of this rank.
            announce: Callable that logs the first step in which tokens are skipped.
        """
        self._heads, self._retrieval_heads, self.plan, self._announce = heads, retrieval_heads, plan, announce

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the cache of every head."""
        del layer, kv_cache, slot_mapping  # those of one head; all heads are bound here
        context: Any = get_forward_context()
        metadata = context.attn_metadata
        if not metadata:  # warming up
            return
        caches = self._look_at_caches()
        per_head = [metadata[head.layer_name] for head in self._heads]
        slots = [context.slot_mapping[head.layer_name] for head in self._heads]
        caches.bind([m.block_table for m in per_head], slots)
        caches.store_kv(key[: len(slots[0])], value[: len(slots[0])])
        caches.update_means(per_head[0].step)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention; shapes are those of vLLM's `AttentionImpl.forward`."""
        del layer, key, value, kv_cache, output_scale, output_block_scale
        if attn_metadata is None:  # warming up
            return output
        if attn_metadata.windowed:
            self._announce(attn_metadata.windowed)
        self._caches.attend(query, self.scale, output, attn_metadata.step)  # type: ignore[attr-defined]
        return output

    def _look_at_caches(self) -> Any:
        caches = [head.kv_cache for head in self._heads]
        addresses = [cache.data_ptr() for cache in caches]
        # Addresses change, since vLLM profiles CUDA graphs with a small cache before it allocates the final one.
        if addresses != self._places:
            windowed = [head not in self._retrieval_heads for head in range(len(caches))]
            self._caches, self._places = self.head_caches(caches, windowed, self.plan.window), addresses
        return self._caches


def split_layers_into_heads(vllm_config: Any) -> None:
    """Split all attention layers of a model into KV heads by the policy's head plan, and log the attached policy.

    Raises:
        Unsupported: The engine or a layer cannot be served.
    """
    attachment = attach("kv", vllm_config)
    assert attachment is not None
    compatibility.check(attachment, vllm_config)
    prompt_lengths.apply_patch(vllm_config)
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    plan = policy.head_plan()
    assert plan is not None  # every policy that frees blocks has one
    layers = vllm_config.compilation_config.static_forward_context
    ours = [
        layer
        for layer in layers.values()
        if isinstance(getattr(layer, "impl", None), WindowedImpl) and not isinstance(layer, kv_cache_spec.HeadLayer)
    ]
    retrieval, total = sum(map(len, plan.retrieval_heads)), len(plan.retrieval_heads) * attachment.engine.kv_heads
    group = get_tp_group()
    plan = plan.for_rank(group.rank_in_group, group.world_size, attachment.engine.kv_heads)
    per_layer = [plan.retrieval_heads[extract_layer_index(layer.layer_name)] for layer in ours]
    for layer in ours:
        layer.impl.policy = policy.name
        check_windowed_layer(layer, policy.name, vllm_config.model_config.model)
    announce = LogWhenActive(policy.name)
    for layer, heads, retrieval_heads in zip(
        ours, kv_cache_spec.split_into_heads(ours, layers, per_layer, plan.window), per_layer, strict=True
    ):
        layer.impl.use(heads, retrieval_heads, plan, announce)
    how = f"over {ours[0].impl.over}; {retrieval} of {total} KV heads are retrieval heads ({retrieval / total:.1%})"
    log.logger.info(log.start_up_table("kv", attachment, how))


def check_windowed_layer(layer: Any, policy: str, model: str) -> None:
    """Raise `Unsupported` if a layer has a feature that the kernels do not support."""
    impl = layer.impl
    reasons = ["it has its own sliding window"] if has_sliding_window(impl) else unsupported_features(impl, 32)
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        reasons.append("it reads the cache of another layer")
    if type(layer).__name__ == "ChunkedLocalAttention":
        reasons.append("it uses chunked local attention")
    if reasons:
        raise Unsupported(policy, reasons[0], "run without the policy", model, layer.layer_name)


def check_kernels(impl: Any, test: Callable[[], str | None], model: str) -> None:
    """Run the kernels' self-test.

    Args:
        impl: Attention implementation of a layer.
        test: Self-test, which returns an error message or None.
        model: Name of the model, for the error message.

    Raises:
        Unsupported: The self-test fails or cannot run.
    """
    try:
        error = test()
    except Exception as failure:  # any error of a compiler or kernel is a reason not to start
        error = f"the kernels do not run here ({(str(failure).strip() or type(failure).__name__).splitlines()[-1]})"
    if error is not None:
        raise Unsupported(impl.policy, error, "run without the policy", model)


def self_test_windowed(
    head_caches: type,
    make_step: Callable[[int, int, HeadWindow], Any],
    dtype: torch.dtype,
    num_queries_per_kv: int,
    head_size: int,
    block_size: int,
    device: Any,
) -> str | None:
    """Compare our kernels on a prompt and on a decoded token with reference attention.

    Args:
        head_caches: Class of the kernels.
        make_step: Function from the first position, the end position and the window of one request to the kernels'
            description of the step.
        dtype: Data type of the cache.
        num_queries_per_kv: Number of query heads per KV head.
        head_size: Size of a head.
        block_size: Number of tokens per block.
        device: Device of the cache.

    Returns:
        An error message, or None if they agree.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = 3 * block_size + 9
    key, value, query = (
        torch.randn(prompt + 1, heads, head_size, generator=generator).to(dtype).to(device)
        for heads in (1, 1, num_queries_per_kv)
    )
    page = block_size * 2 * head_size + means_bytes(head_size) // dtype.itemsize
    cache = torch.zeros(5 * page, dtype=dtype, device=device).as_strided(
        (5, 1, block_size, 2 * head_size), (page, block_size * 2 * head_size, 2 * head_size, 1)
    )
    table = torch.tensor([[2, 0, 4, 1]], dtype=torch.int32, device=device)
    position = torch.arange(prompt + 1, device=device)
    slots = table[0, position // block_size].long() * block_size + position % block_size
    window = HeadWindow(1, block_size, 0, compensation=True, exact_prefill=False)
    caches = head_caches([cache], [True], window)
    output, scale, worst = torch.empty_like(query), head_size**-0.5, 0.0
    q, k, v = (x.double().cpu().numpy() for x in (query, key[:, 0], value[:, 0]))
    for begin, end in ((0, prompt), (prompt, prompt + 1)):
        caches.bind([table], [slots[begin:end]])
        step = make_step(begin, end, window)
        caches.store_kv(key[begin:end], value[begin:end])
        caches.update_means(step)
        caches.attend(query[begin:end], scale, output[begin:end], step)
        evicted = (block_size, block_size + window.num_evicted(end - 1, block_size))
        expected = RazorAttention.windowed_attention(q[end - 1], k[:end], v[:end], scale, evicted, compensation=True)
        worst = max(worst, abs(output[end - 1].double().cpu().numpy() - expected).max())
    return None if worst < 0.03 else f"the kernels misread the cache (self-test: off by {worst:.3g})"
