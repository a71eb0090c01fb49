"""Engine settings and attention layers that the attention backends cannot serve."""

from typing import Any

from ....kvcache.selection import ReadPlan
from ....plugins.contracts import Unsupported
from ..engine import log
from ..engine.selection import Attachment

NO_SLIDING_WINDOW = (-1, (-1, -1), None)  # values that vLLM's backends use for "no sliding window"


def has_sliding_window(impl: Any) -> bool:
    """Return whether a layer uses sliding-window attention; vLLM's kernels compute such layers."""
    return impl.sliding_window not in NO_SLIDING_WINDOW


class LogWhenActive:
    """Callable that logs once that a KV policy is active: at the first step that uses its kernels.

    Args:
        plugin: Name of the KV policy.
    """

    def __init__(self, plugin: str) -> None:
        self._plugin, self._made = plugin, False

    def __call__(self, context: int) -> None:
        """Log a step whose longest context has ``context`` tokens, if it is the first."""
        if not self._made:
            self._made = True
            log.logger.info("pilotfish: kv %s is active, at a context of %d tokens", self._plugin, context)


def unsupported_features(impl: Any, multiple: int) -> list[str]:
    """Return the features of a layer that our kernels do not support.

    Args:
        impl: vLLM's attention implementation of the layer.
        multiple: Number of which the head size has to be a multiple.
    """
    return [
        reason
        for present, reason in (
            (impl.alibi_slopes is not None, "ALiBi biases"),
            (bool(impl.logits_soft_cap), "logits soft capping"),
            (impl.sinks is not None, "learned attention sinks"),
            (impl.head_size % multiple != 0, f"a head size of {impl.head_size}, which is no multiple of {multiple}"),
        )
        if present
    ]


METHODS_WITHOUT_MODEL = ("custom_class", "ngram", "suffix")  # speculative methods without a draft model


def check(attachment: Attachment, vllm_config: Any) -> None:
    """Check the engine settings that the selected KV policy requires; layers are checked when they are built.

    Args:
        attachment: The attached KV policy.
        vllm_config: vLLM's configuration of the engine.

    Raises:
        Unsupported: The engine cannot serve the policy.
    """
    check_attention(attachment.name, vllm_config)
    if (plan := attachment.cls(attachment.options, attachment.engine).read_plan()) is not None:
        _check_read_plan(attachment, plan, vllm_config)
    if attachment.cls.frees_blocks:  # type: ignore[attr-defined]
        _check_blocks(attachment.name, vllm_config)


def check_attention(plugin: str, vllm_config: Any) -> None:
    """Check that our kernels support the engine's model, device, data type and parallelism.

    Args:
        plugin: Name of the plugin, for the error message.
        vllm_config: vLLM's configuration of the engine.

    Raises:
        Unsupported: The kernels do not support it.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    run_without = "run without the policy"
    for present, reason, remedy in (
        (
            vllm_config.device_config.device_type not in ("cpu", "cuda"),
            f"it supports CPU and CUDA devices, not {vllm_config.device_config.device_type}",
            run_without,
        ),
        (model.runner_type == "pooling", "pooling models do not decode", run_without),
        (model.is_encoder_decoder, "encoder-decoder models are not supported", run_without),
        (model.use_mla, "multi-head latent attention has no keys per head", run_without),
        (
            dtype not in ("auto", "float32", "bfloat16", "float16"),
            f"kv_cache_dtype={dtype} is quantised",
            "omit --kv-cache-dtype",
        ),
        (
            dtype in ("float32", "bfloat16", "float16") and dtype != str(model.dtype).removeprefix("torch."),
            f"kv_cache_dtype={dtype} is not the model's {str(model.dtype).removeprefix('torch.')}",
            "omit --kv-cache-dtype",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism is not supported",
            "use --tensor-parallel-size instead",
        ),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "context parallelism is not supported",
            "disable context parallelism",
        ),
    ):
        if present:
            raise Unsupported(plugin, reason, remedy, model.model)


def _check_read_plan(attachment: Attachment, plan: ReadPlan, vllm_config: Any) -> None:
    """Check that computed tokens can be recomputed and that layers write every key, if the policy depends on it."""
    if plan.keeps_page_bounds and vllm_config.kv_transfer_config is not None:
        raise Unsupported(
            attachment.name,
            "a KV connector loads keys without the bounds of their pages",
            "disable the connector",
            attachment.engine.model,
        )
    if not plan.correction_interval:
        return
    for present, reason, remedy in (
        (
            vllm_config.speculative_config is not None,
            "draft tokens would be counted as computed",
            "no --speculative-config",
        ),
        (vllm_config.scheduler_config.async_scheduling, "steps are scheduled in advance", "--no-async-scheduling"),
        (
            getattr(vllm_config, "use_v2_model_runner", False),
            "the V2 model runner keeps its own count of computed tokens",
            "VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ):
        if present:
            raise Unsupported(
                attachment.name, f"with correction_interval, {reason}", f"use {remedy}", attachment.engine.model
            )


def _check_blocks(plugin: str, vllm_config: Any) -> None:
    """Check that no part of the engine expects a request to keep all KV blocks, or its heads to share a block table."""
    cache, speculative = vllm_config.cache_config, vllm_config.speculative_config
    run_without = "run without the policy"
    for present, reason, remedy in (
        (
            speculative is not None and speculative.method not in METHODS_WITHOUT_MODEL,
            f"the speculative method '{getattr(speculative, 'method', '')}' has its own attention layers",
            f"use a method without: {', '.join(METHODS_WITHOUT_MODEL)}",
        ),
        (
            getattr(vllm_config.model_config, "is_mm_prefix_lm", False),
            "image tokens attend to later tokens",
            run_without,
        ),
        (
            getattr(vllm_config.model_config, "rswa_window", None) is not None,
            "the model uses a sliding window for generated tokens",
            run_without,
        ),
        (
            cache.enable_prefix_caching,
            "prefix caching would look for freed blocks",
            "use --no-enable-prefix-caching",
        ),
        (vllm_config.kv_transfer_config is not None, "a KV connector transfers whole blocks", "disable the connector"),
    ):
        if present:
            raise Unsupported(plugin, reason, remedy, vllm_config.model_config.model)
