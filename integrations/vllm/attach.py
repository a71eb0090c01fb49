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
from . import seams, support

logger = logging.getLogger("vllm.pilotfish")


@dataclass(frozen=True)
class Attachment:
    """A plugin that was selected and can be served."""

    cls: type
    options: Any
    engine: Engine


def concerned(additional_config: Any, speculative: Any = None) -> bool:
    """Whether an engine's arguments mention us at all."""
    return _key(additional_config) is not None or support.names_us(speculative)


def _key(additional_config: Any) -> Any:
    return additional_config.get(ROOT) if isinstance(additional_config, Mapping) else None


def read(additional_config: Any, speculative: Any = None) -> PilotfishConfig:
    """The selection, checked as far as possible without an engine: names, options, and the two halves of a drafter.

    Raises:
        ConfigError: the selection cannot be used.
    """
    if disabled():
        return PilotfishConfig()
    value = _key(additional_config)
    config = _parse(json.dumps(value, sort_keys=True)) if value is not None else PilotfishConfig()
    if speculative is not None and support.names_us(speculative) and config.drafter is None:
        raise ConfigError(
            f"{ROOT}.drafter: missing, though --speculative-config names {support.DRAFTER_CLASS}; "
            'add --additional-config \'{"pilotfish": {"drafter": "token_recycling"}}\''
        )
    return config


@functools.lru_cache(maxsize=8)
def _parse(value: str) -> PilotfishConfig:
    config = parse_config(json.loads(value))
    for kind, selection in config.selected().items():
        plugins().resolve(kind, selection)
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
    for kind, selection in config.selected().items():
        cls, options = plugins().resolve(kind, selection)
        problem = seams.problem(allow_untested=config.allow_untested_vllm)
        if problem is not None:
            raise Unsupported(cls.name, problem[0], problem[1], vllm_config.model_config.model)  # type: ignore[attr-defined]
        engine = describe(vllm_config)
        support.check(kind, cls, options, config, vllm_config)
        cls.check(options, engine)  # type: ignore[attr-defined]
        if kind == "pruner":
            from .vision import support as vision

            pruner: Any = cls(options)
            vision.check_layers(cls.name, pruner, vllm_config)  # type: ignore[attr-defined]
            if pruner.layer_schedule() is not None:
                patches.REQUESTS.apply()
            vision.install(selection, vllm_config)
        if kind == "drafter":
            support.check_tokenizer(cls, options, vllm_config.model_config)
        if kind == "kv":
            support.check_correction(cls, options, engine, vllm_config)
            if cls.frees_blocks:  # type: ignore[attr-defined]
                support.check_blocks(cls.name, vllm_config)  # type: ignore[attr-defined]
                patches.REQUESTS.apply()
                patches.RECORD.apply()
        attached[kind] = Attachment(cls, options, engine)
    if "drafter" in attached or "kv" in attached:
        patches.COUNTERS.apply()
    return attached


def kv_policy(vllm_config: Any) -> KVPolicy | None:
    """The KV policy that an engine runs with, made anew; None when it runs without."""
    selection = read(vllm_config.additional_config).kv
    if selection is None:
        return None
    cls, options = plugins().resolve("kv", selection)
    return cls(options, describe(vllm_config))


def refuses(vllm_config: Any, params: Any, resumable: bool) -> str | None:
    """Why an engine cannot serve a request with what was selected; None where it can."""
    policy = kv_policy(vllm_config) if resumable else None
    if policy is not None and policy.frees_blocks:
        return (
            f"{policy.name}: a session of inputs that follow one another would read blocks that were given back; send "
            "whole prompts, or leave the policy out"
        )
    selection = read(vllm_config.additional_config).pruner
    if selection is not None and getattr(params, "prompt_logprobs", None) is not None:
        cls, options = plugins().resolve("pruner", selection)
        if cls(options).layer_schedule() is not None:
            return f"{cls.name}: prompt_logprobs would be those of tokens that left; leave them out"  # type: ignore[attr-defined]
    return None


def over_draft_model(vllm_config: Any) -> bool:
    """Whether a drafter was selected that builds on a draft model of vLLM's."""
    selection = read(vllm_config.additional_config).drafter
    if selection is None:
        return False
    cls, options = plugins().resolve("drafter", selection)
    return cls.needs_draft_model(options)  # type: ignore[attr-defined]


def attention_backend(stock: type, vllm_config: Any) -> type:
    """What stands over the backend that vLLM chose for a layer, where a KV policy or tree verification is selected.

    Raises:
        Unsupported: there is nothing of ours that stands over this one.
    """
    config = read(vllm_config.additional_config)
    name = stock.get_name()  # type: ignore[attr-defined]
    if config.drafter is not None and config.verification.verification == "tree":
        if name == "CPU_ATTN":
            from .tree_cpu import TreeCPUBackend

            return TreeCPUBackend
        if name in ("TRITON_ATTN", "FLASH_ATTN"):  # whose kernels ours replace
            from .tree_triton import TreeTritonBackend

            return TreeTritonBackend
        raise Unsupported(
            config.drafter.name,
            f"trees are not verified over {name}",
            "use verification=chain",
            vllm_config.model_config.model,
        )
    policy = kv_policy(vllm_config)
    if policy is None:
        return stock
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


def announce_pruner(vllm_config: Any) -> None:
    """Say in a worker's log which pruner its model has."""
    selection = read(vllm_config.additional_config).pruner
    if selection is None:
        return
    cls, options = plugins().resolve("pruner", selection)
    how = "between projector and language model"
    if (schedule := cls(options).layer_schedule()) is not None:
        how += f"; EXPERIMENTAL: and inside it, layers {schedule.first} to {schedule.last}"
    logger.info("%s", start_up_table("pruner", Attachment(cls, options, describe(vllm_config)), how))


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
