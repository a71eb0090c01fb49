"""Attention over KV heads with caches of their own, of which most keep a window; what all platforms share.

Keys and values are written and read by our kernels, a few calls for a layer whatever its heads. What a step leaves out
is computed from the lengths of its requests alone, exactly as the cache manager does, so the two agree without talking.
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
from ..compatibility import LogWhenActive, is_windowed, unsupported_features
from . import kv_cache_spec


class WindowedImpl:
    """The attention of one layer; stands before vLLM's among the bases of a class."""

    over: ClassVar[str]  # name of vLLM's backend
    head_caches: ClassVar[type]  # of this platform's kernels
    policy: str
    plan: HeadPlan  # of this rank
    _announce: LogWhenActive
    _whole: frozenset[int]  # KV heads that keep everything
    _heads: Sequence[Any] = ()  # cache layers, one for each KV head
    _caches: Any = None
    _places: Sequence[int] = ()  # addresses of the caches that these are

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernel writes what it computes; nothing is quantised on the way."""
        del quant_key
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Our kernel writes keys that are rotated already."""
        return False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split the layer into heads: called when the model is loaded, before the engine asks for cache specs."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if not self._heads:  # the first layer splits all of them; weights that are loaded anew change nothing
            split_layers_into_heads(self._vllm_config)

    def use(self, heads: Sequence[Any], whole: frozenset[int], plan: HeadPlan, announce: LogWhenActive) -> None:
        """Take cache layers, one for each KV head, of which ``whole`` keep everything."""
        self._heads, self._whole, self.plan, self._announce = heads, whole, plan, announce

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the blocks of every head."""
        del layer, kv_cache, slot_mapping  # of one head; all are bound here
        context: Any = get_forward_context()
        metadata = context.attn_metadata
        if not metadata:  # warming up
            return
        caches = self._look_at_caches()
        mine = [metadata[head.layer_name] for head in self._heads]
        slots = [context.slot_mapping[head.layer_name] for head in self._heads]
        caches.bind([m.block_table for m in mine], slots)
        caches.store_kv(key[: len(slots[0])], value[: len(slots[0])])
        caches.update_means(mine[0].step)

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
        """As vLLM's; see there for the shapes."""
        del layer, key, value, kv_cache, output_scale, output_block_scale
        if attn_metadata is None:  # warming up
            return output
        if attn_metadata.windowed:
            self._announce(attn_metadata.windowed)
        self._caches.attend(query, self.scale, output, attn_metadata.step)  # type: ignore[attr-defined]
        return output

    def _look_at_caches(self) -> Any:
        caches = [head.kv_cache for head in self._heads]
        places = [cache.data_ptr() for cache in caches]
        # They move when vLLM measures CUDA graphs with a small cache before it makes the real one.
        if places != self._places:
            windowed = [head not in self._whole for head in range(len(caches))]
            self._caches, self._places = self.head_caches(caches, windowed, self.plan.window), places
        return self._caches


def split_layers_into_heads(vllm_config: Any) -> None:
    """Split all attention layers of a model by its policy's plan, and say so in the log.

    Raises:
        Unsupported: the engine or a layer cannot be served.
    """
    attachment = attach("kv", vllm_config)
    assert attachment is not None
    compatibility.check(attachment, vllm_config)
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    plan = policy.head_plan()
    assert plan is not None  # such a policy has one
    layers = vllm_config.compilation_config.static_forward_context
    ours = [
        layer
        for layer in layers.values()
        if isinstance(getattr(layer, "impl", None), WindowedImpl) and not isinstance(layer, kv_cache_spec.HeadLayer)
    ]
    kept, total = sum(map(len, plan.retrieval_heads)), len(plan.retrieval_heads) * attachment.engine.kv_heads
    group = get_tp_group()
    plan = plan.for_rank(group.rank_in_group, group.world_size, attachment.engine.kv_heads)
    whole = [plan.retrieval_heads[extract_layer_index(layer.layer_name)] for layer in ours]
    for layer in ours:
        layer.impl.policy = policy.name
        _check_layer(layer, vllm_config.model_config.model)
    announce = LogWhenActive(policy.name)
    for layer, heads, kept_here in zip(
        ours, kv_cache_spec.split_into_heads(ours, layers, whole, plan.window), whole, strict=True
    ):
        layer.impl.use(heads, kept_here, plan, announce)
    how = f"over {ours[0].impl.over}; {kept} of {total} KV heads keep everything ({kept / total:.1%})"
    log.logger.info(log.start_up_table("kv", attachment, how))


def _check_layer(layer: Any, model: str) -> None:
    """Refuse what the kernels do not compute."""
    impl = layer.impl
    reasons = ["its sliding window drops positions already"] if is_windowed(impl) else unsupported_features(impl, 32)
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        reasons.append("it reads the cache of another layer")
    if type(layer).__name__ == "ChunkedLocalAttention":
        reasons.append("it attends in chunks")
    if reasons:
        raise Unsupported(impl.policy, reasons[0], "leave the policy out", model, layer.layer_name)


def check_kernels(impl: Any, test: Callable[[], str | None], model: str) -> None:
    """Refuse kernels that fail their self-test, or cannot run it."""
    try:
        error = test()
    except Exception as failure:  # whatever a compiler or a shape brings up is a reason not to start
        error = f"the kernels do not run here ({(str(failure).strip() or type(failure).__name__).splitlines()[-1]})"
    if error is not None:
        raise Unsupported(impl.policy, error, "leave the policy out", model)


def self_test_windowed(
    head_caches: type,
    make_step: Callable[[int, int, HeadWindow], Any],
    dtype: torch.dtype,
    share: int,
    head_size: int,
    block_size: int,
    device: Any,
) -> str | None:
    """Self-test: a prompt and a decoded token by our kernels against attention computed plainly.

    Args:
        head_caches: Of the kernels.
        make_step: Describes a step of one request whose positions go from and to, for the kernels.
        dtype: Of the cache.
        share: Query heads of a KV head.
        head_size: Of a head.
        block_size: Positions of a block.
        device: Of the cache.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = 3 * block_size + 9
    key, value, query = (
        torch.randn(prompt + 1, heads, head_size, generator=generator).to(dtype).to(device) for heads in (1, 1, share)
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
        stretch = (block_size, block_size + window.num_evicted(end - 1, block_size))
        expected = RazorAttention.windowed_attention(q[end - 1], k[:end], v[:end], scale, stretch, compensation=True)
        worst = max(worst, abs(output[end - 1].double().cpu().numpy() - expected).max())
    return None if worst < 0.03 else f"the kernels misread the cache (self-test: off by {worst:.3g})"
