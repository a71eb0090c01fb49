"""From configuration to engine: what was selected, whether it can be served, and what is said when it cannot.

Called by the door-keeper in the front process, before any engine starts, and again by our drafter inside the worker.
"""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kvcache.profiles import fingerprint
from ...plugins.config import ROOT, ConfigError, PilotfishConfig, parse_config
from ...plugins.contracts import Engine, KVPolicy, Unsupported
from ...plugins.manager import disabled, plugins
from . import seams

logger = logging.getLogger("vllm.pilotfish")

DRAFTER_CLASS = "pilotfish.integrations.vllm.Drafter"


WITHOUT_MODEL = ("custom_class", "ngram", "suffix")  # methods of speculation that run no model of their own
ATTACHED = ("kv", "drafter")  # the kinds that this release attaches


@dataclass(frozen=True)
class Attachment:
    """A plugin that was selected and can be served."""

    cls: type
    options: Any
    engine: Engine


def concerned(additional_config: Any, speculative: Any = None) -> bool:
    """Whether an engine's arguments mention us at all."""
    return _key(additional_config) is not None or _names_us(speculative)


def _key(additional_config: Any) -> Any:
    return additional_config.get(ROOT) if isinstance(additional_config, Mapping) else None


def _names_us(speculative: Any) -> bool:
    model = speculative.get("model") if isinstance(speculative, Mapping) else getattr(speculative, "model", None)
    return model == DRAFTER_CLASS


def read(additional_config: Any, speculative: Any = None) -> PilotfishConfig:
    """The selection, checked as far as possible without an engine: names, options, and the two halves of a drafter.

    Raises:
        ConfigError: the selection cannot be used.
    """
    if disabled():
        return PilotfishConfig()
    value = _key(additional_config)
    config = _parse(json.dumps(value, sort_keys=True)) if value is not None else PilotfishConfig()
    if speculative is not None and _names_us(speculative) and config.drafter is None:
        raise ConfigError(
            f"{ROOT}.drafter: missing, though --speculative-config names {DRAFTER_CLASS}; "
            'add --additional-config \'{"pilotfish": {"drafter": "token_recycling"}}\''
        )
    return config


@functools.lru_cache(maxsize=8)
def _parse(value: str) -> PilotfishConfig:
    config = parse_config(json.loads(value))
    for kind, selection in config.selected().items():
        plugins().resolve(kind, selection)
        if kind not in ATTACHED:
            raise ConfigError(f"{ROOT}.{kind}: this release attaches no {kind}")
    return config


def admit(vllm_config: Any) -> dict[str, Attachment]:
    """Check the whole engine configuration; returns what is attached, by kind.

    Raises:
        ConfigError: the selection is wrong.
        Unsupported: it is right, but this engine cannot serve it.
    """
    config = read(vllm_config.additional_config, vllm_config.speculative_config)
    if disabled():
        logger.warning("pilotfish: PILOTFISH_DISABLE is set, no plugin is attached")
        return {}
    from . import patches

    attached = {}
    checks = {"kv": _check_attention, "drafter": _check_speculation}
    for kind, selection in config.selected().items():
        cls, options = plugins().resolve(kind, selection)
        problem = seams.problem(allow_untested=config.allow_untested_vllm)
        if problem is not None:
            raise Unsupported(cls.name, problem[0], problem[1], vllm_config.model_config.model)  # type: ignore[attr-defined]
        checks[kind](cls.name, vllm_config)  # type: ignore[attr-defined]
        engine = describe(vllm_config)
        cls.check(options, engine)  # type: ignore[attr-defined]
        if kind == "kv":
            _check_correction(cls, options, engine, vllm_config)
            if cls.frees_blocks:  # type: ignore[attr-defined]
                _check_blocks(cls.name, vllm_config)  # type: ignore[attr-defined]
                patches.SESSIONS.apply()
        attached[kind] = Attachment(cls, options, engine)
    if "drafter" in attached:
        patches.COUNTERS.apply()
    return attached


def kv_policy(vllm_config: Any) -> KVPolicy | None:
    """The KV policy that an engine runs with, made anew; None when it runs without."""
    selection = read(vllm_config.additional_config).kv
    if selection is None:
        return None
    cls, options = plugins().resolve("kv", selection)
    return cls(options, describe(vllm_config))


def attention_backend(stock: type, vllm_config: Any) -> type:
    """What stands over the backend that vLLM chose for a layer, where a KV policy is selected.

    Raises:
        Unsupported: there is nothing of ours that stands over this one.
    """
    policy = kv_policy(vllm_config)
    if policy is None:
        return stock
    name = stock.get_name()  # type: ignore[attr-defined]
    if policy.frees_blocks:
        if name == "CPU_ATTN":
            from .windowed_cpu import WindowedCPUBackend

            return WindowedCPUBackend
        if name in ("TRITON_ATTN", "FLASH_ATTN"):  # whose kernels ours replace
            from .windowed_triton import WindowedTritonBackend

            return WindowedTritonBackend
        raise Unsupported(
            policy.name,
            f"it does not stand over {name}",
            "use --attention-backend TRITON_ATTN",
            vllm_config.model_config.model,
        )
    if name == "CPU_ATTN":
        from .sparse_cpu import SparseCPUBackend

        return SparseCPUBackend
    if name == "TRITON_ATTN":
        from .sparse_cuda import SparseTritonBackend

        return SparseTritonBackend
    if name == "FLASH_ATTN":
        from .sparse_flash import SparseFlashBackend

        return SparseFlashBackend
    raise Unsupported(
        policy.name,
        f"it does not stand over {name}",
        "choose --attention-backend TRITON_ATTN or FLASH_ATTN",
        vllm_config.model_config.model,
    )


def describe(vllm_config: Any) -> Engine:
    """The facts about an engine that plugins are told."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    return Engine(
        model=model.model,
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        num_speculative_tokens=speculative.num_speculative_tokens if speculative else 0,
        dtype=str(model.dtype).removeprefix("torch."),
        device=vllm_config.device_config.device_type,
        tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        layers=model.get_total_num_hidden_layers(),
        kv_heads=model.get_total_num_kv_heads(),
        fingerprint=fingerprint(model.hf_text_config.to_dict()),
    )


def _check_speculation(plugin: str, vllm_config: Any) -> None:
    """The drafter's other half, and what in the engine would keep it from working as promised."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config.model
    if speculative is None or not _names_us(speculative) or speculative.method != "custom_class":
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


def _check_correction(cls: Any, options: Any, engine: Engine, vllm_config: Any) -> None:
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


def _check_blocks(plugin: str, vllm_config: Any) -> None:
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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Under vLLM's command line, turn our refusals into one line on standard error and exit code 2.

    A program that embeds vLLM gets the exception itself.
    """
    try:
        yield
    except (ConfigError, Unsupported) as error:
        if not _under_command_line():
            raise
        print(f"pilotfish: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise SystemExit(2) from None


def _under_command_line() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm.entrypoints"))


def start_up_table(kind: str, attachment: Attachment, how: str) -> str:
    """What is attached and ``how``, as one log message."""
    engine = attachment.engine
    lines = [
        f"pilotfish: {kind} {attachment.cls.name} selected",  # type: ignore[attr-defined]
        f"  origin     {plugins().origin(attachment.cls)}",
        f"  options    {attachment.options}",
        f"  engine     {engine.model}, {engine.layers} layers, vocabulary {engine.vocab_size}, {engine.device}, "
        f"{engine.dtype}",
        f"  attached   {how}",
        f"  seams      {len(seams.TABLE)} checked against vLLM {seams.installed_version()}",
    ]
    return "\n".join(lines)
