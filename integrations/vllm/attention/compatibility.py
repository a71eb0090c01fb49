"""Engine settings and attention layers that the attention backends cannot serve."""

from typing import Any

from ....plugins.contracts import Unsupported
from ..engine import log
from ..engine.selection import Attachment

NO_SLIDING_WINDOW = (-1, (-1, -1), None)  # as backends write it


def is_windowed(impl: Any) -> bool:
    """Whether a layer sees a sliding window only; such layers are left to vLLM."""
    return impl.sliding_window not in NO_SLIDING_WINDOW


class LogWhenActive:
    """Says once that a policy is active: when a step goes through its kernels."""

    def __init__(self, plugin: str) -> None:
        self._plugin, self._made = plugin, False

    def __call__(self, context: int) -> None:
        """A step is sparse, whose longest context is ``context`` tokens."""
        if not self._made:
            self._made = True
            log.logger.info("pilotfish: kv %s is active, at a context of %d tokens", self._plugin, context)


def unsupported_features(impl: Any, multiple: int) -> list[str]:
    """What a layer computes that none of our kernels does; its head size has to be a multiple of ``multiple``."""
    return [
        reason
        for present, reason in (
            (impl.alibi_slopes is not None, "ALiBi biases"),
            (bool(impl.logits_soft_cap), "a soft cap of the scores"),
            (impl.sinks is not None, "attention sinks that are learned"),
            (impl.head_size % multiple != 0, f"heads of {impl.head_size}"),
        )
        if present
    ]


METHODS_WITHOUT_MODEL = ("custom_class", "ngram", "suffix")  # methods of speculation that run no model of their own


def check(attachment: Attachment, vllm_config: Any) -> None:
    """Check everything that the selected KV policy needs of an engine; single layers are checked where they are built.

    Raises:
        Unsupported: The engine cannot serve it.
    """
    check_attention(attachment.name, vllm_config)
    _check_correction(attachment, vllm_config)
    if attachment.cls.frees_blocks:  # type: ignore[attr-defined]
        _check_blocks(attachment.name, vllm_config)


def check_attention(plugin: str, vllm_config: Any) -> None:
    """Check that the engine's attention is one that our kernels compute."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    leave_out = "leave the policy out"
    for present, reason, remedy in (
        (
            vllm_config.device_config.device_type not in ("cpu", "cuda"),
            f"it reads the caches of CPUs and CUDA devices, not of {vllm_config.device_config.device_type}",
            leave_out,
        ),
        (model.runner_type == "pooling", "a pooling model decodes nothing", leave_out),
        (model.is_encoder_decoder, "encoder-decoder models are not served", leave_out),
        (model.use_mla, "multi-head latent attention keeps no keys per head", leave_out),
        (
            dtype not in ("auto", "float32", "bfloat16", "float16"),
            f"kv_cache_dtype={dtype} is quantised",
            "leave out --kv-cache-dtype",
        ),
        (
            dtype in ("float32", "bfloat16", "float16") and dtype != str(model.dtype).removeprefix("torch."),
            f"kv_cache_dtype={dtype} is not the model's {str(model.dtype).removeprefix('torch.')}",
            "leave out --kv-cache-dtype",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "a choice does not cross pipeline stages",
            "use --tensor-parallel-size instead",
        ),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "context parallelism splits what is chosen from",
            "leave context parallelism out",
        ),
    ):
        if present:
            raise Unsupported(plugin, reason, remedy, model.model)


def _check_correction(attachment: Attachment, vllm_config: Any) -> None:
    """Check that a request's computed tokens can be set back, where the policy corrects the KV cache."""
    plan = attachment.cls(attachment.options, attachment.engine).read_plan()
    if plan is None or not plan.correction_interval:
        return
    for present, reason, remedy in (
        (vllm_config.speculative_config is not None, "drafted tokens would be counted as computed", "no speculation"),
        (vllm_config.scheduler_config.async_scheduling, "steps are scheduled ahead", "--no-async-scheduling"),
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
    """Check that nothing in the engine expects all KV blocks of a request to stay, or one block table for all heads."""
    cache, speculative = vllm_config.cache_config, vllm_config.speculative_config
    leave_out = "leave the policy out"
    for present, reason, remedy in (
        (
            speculative is not None and speculative.method not in METHODS_WITHOUT_MODEL,
            f"the drafter '{getattr(speculative, 'method', '')}' has attention layers of its own",
            f"choose one without: {', '.join(METHODS_WITHOUT_MODEL)}",
        ),
        (
            getattr(vllm_config.model_config, "is_mm_prefix_lm", False),
            "tokens of a picture look at those behind them",
            leave_out,
        ),
        (
            getattr(vllm_config.model_config, "rswa_window", None) is not None,
            "the model has a window of its own for what it generates",
            leave_out,
        ),
        (
            cache.enable_prefix_caching,
            "prefix caching would look for blocks that were given back",
            "use --no-enable-prefix-caching",
        ),
        (vllm_config.kv_transfer_config is not None, "a KV connector moves whole blocks", "leave the connector out"),
        (
            getattr(vllm_config, "use_v2_model_runner", False),
            "the V2 model runner does not say what is a prompt",
            "set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ):
        if present:
            raise Unsupported(plugin, reason, remedy, vllm_config.model_config.model)
