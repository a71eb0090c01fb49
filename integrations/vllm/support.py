"""What in an engine's configuration would keep a selected plugin from working as promised."""

import json
from collections.abc import Mapping
from typing import Any

from ...plugins.config import ROOT, ConfigError, PilotfishConfig, Verification
from ...plugins.contracts import Engine, Unsupported

DRAFTER_CLASS = "pilotfish.integrations.vllm.Drafter"
DRAFT_MODEL = json.dumps({"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 8})
WITHOUT_MODEL = ("custom_class", "ngram", "suffix")  # methods of speculation that run no model of their own


def drafted_tokens(drafter: Any, verification: Verification) -> int:
    """Drafted tokens of a request and step at most, where nobody says how many."""
    if verification.verification == "chain":
        return drafter.default_depth
    return drafter.default_nodes if verification.nodes is None else max(verification.nodes, 1)


def names_us(speculative: Any) -> bool:
    """Whether a speculative configuration, as a mapping or as vLLM's object, asks for our proposer."""
    model = speculative.get("model") if isinstance(speculative, Mapping) else getattr(speculative, "model", None)
    return model == DRAFTER_CLASS


def check(kind: str, cls: Any, options: Any, config: PilotfishConfig, vllm_config: Any) -> None:
    """What any plugin of a kind needs of an engine.

    Raises:
        ConfigError: the other half of the selection is missing.
        Unsupported: the engine cannot serve it.
    """
    if kind == "kv":
        _check_attention(cls.name, vllm_config)
    elif kind == "pruner":
        from .vision import support

        support.check(cls.name, vllm_config)
    else:
        _check_speculation(cls, options, config, vllm_config)
        if config.verification.verification == "tree":
            _check_trees(cls.name, config, vllm_config)


def _check_speculation(cls: Any, options: Any, config: PilotfishConfig, vllm_config: Any) -> None:
    """The drafter's other half, and what in the engine would keep it from working as promised."""
    plugin, speculative, model = cls.name, vllm_config.speculative_config, vllm_config.model_config.model
    if cls.needs_draft_model(options):
        _check_draft_model(plugin, config, vllm_config)
    elif speculative is None or not names_us(speculative) or speculative.method != "custom_class":
        value = json.dumps({"method": "custom_class", "model": DRAFTER_CLASS, "num_speculative_tokens": 12})
        raise ConfigError(
            f"{ROOT}.drafter: {plugin} is selected but the engine would not call it; add --speculative-config '{value}'"
        )
    if getattr(vllm_config, "use_v2_model_runner", False):
        raise Unsupported(
            plugin, "the V2 model runner takes no custom drafter", "set VLLM_USE_V2_MODEL_RUNNER=0", model
        )
    if getattr(speculative, "rejection_sample_method", "standard") not in ("standard", "block"):
        raise Unsupported(
            plugin,
            f"rejection_sample_method={speculative.rejection_sample_method!r} changes the output distribution",
            "leave it out of --speculative-config",
            model,
        )
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise Unsupported(
            plugin, "prompts given as embeddings have no tokens", "leave out --enable-prompt-embeds", model
        )
    if vllm_config.model_config.runner_type == "pooling":
        raise Unsupported(plugin, "a pooling model generates no tokens", "leave the drafter out", model)


def _check_draft_model(plugin: str, config: PilotfishConfig, vllm_config: Any) -> None:
    """What a drafter over vLLM's own draft model needs of it."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config.model
    if speculative is None or speculative.method != "draft_model":
        raise ConfigError(f"{ROOT}.drafter: {plugin} builds on a draft model; add --speculative-config '{DRAFT_MODEL}'")
    if vllm_config.scheduler_config.async_scheduling:
        raise Unsupported(
            plugin, "steps are scheduled before it is known what is drafted", "use --no-async-scheduling", model
        )
    if config.verification.verification == "tree":
        raise Unsupported(
            plugin, "the draft model's cache knows no trees", "use verification=chain, or another base", model
        )


def check_tokenizer(cls: Any, options: Any, model_config: Any) -> None:
    """Refuse a drafter whose token ids were made by a tokenizer with another vocabulary than the model's.

    Raises:
        Unsupported: it is another.
    """
    if (wanted := cls.tokenizer(options)) is None:
        return
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    from ...retrieval.datastore import fingerprint

    found = cached_tokenizer_from_config(model_config)
    if found is not None and fingerprint(found.get_vocab()) != wanted[0]:
        raise Unsupported(
            cls.name,
            f"its token ids are those of another tokenizer ({wanted[1]})",
            "build it with --tokenizer of the model that is served",
            model_config.model,
        )


def _check_attention(plugin: str, vllm_config: Any) -> None:
    """What in the engine the policy's attention cannot serve; single layers are checked where they are built."""
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


def _check_trees(plugin: str, config: PilotfishConfig, vllm_config: Any) -> None:
    """What keeps trees from being verified, beside what our attention does not serve anywhere."""
    model = vllm_config.model_config
    for present, reason in (
        (config.kv is not None, "trees are verified over stock attention, not under a KV policy"),
        (getattr(model, "uses_mrope", False), "positions of more than one dimension (M-RoPE)"),
        (getattr(model, "is_hybrid", False), "a model with states beside attention cannot drop a branch"),
        (vllm_config.kv_transfer_config is not None, "a KV connector may take what is still to be moved"),
    ):
        if present:
            raise Unsupported(plugin, reason, "use verification=chain", model.model)
    try:
        _check_attention(plugin, vllm_config)
    except Unsupported as error:
        raise Unsupported(plugin, error.reason, "use verification=chain", model.model) from None


def check_correction(cls: Any, options: Any, engine: Engine, vllm_config: Any) -> None:
    """What in the engine keeps a request's computed tokens from being set back."""
    plan = cls(options, engine).read_plan()
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
            raise Unsupported(cls.name, f"with correction_interval, {reason}", f"use {remedy}", engine.model)


def check_blocks(plugin: str, vllm_config: Any) -> None:
    """What in the engine expects all blocks of a request to stay, or one block table for all heads."""
    cache, speculative = vllm_config.cache_config, vllm_config.speculative_config
    leave_out = "leave the policy out"
    for present, reason, remedy in (
        (
            speculative is not None and speculative.method not in WITHOUT_MODEL,
            f"the drafter '{getattr(speculative, 'method', '')}' has attention layers of its own",
            f"choose one without: {', '.join(WITHOUT_MODEL)}",
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
