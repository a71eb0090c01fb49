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

from ...plugins.config import ROOT, ConfigError, PilotfishConfig, parse_config
from ...plugins.contracts import Engine, Unsupported
from ...plugins.manager import disabled, plugins
from . import seams

logger = logging.getLogger("vllm.pilotfish")

DRAFTER_CLASS = "pilotfish.integrations.vllm.Drafter"


@dataclass(frozen=True)
class Drafting:
    """A drafter that was selected and can be served."""

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
        if kind != "drafter":
            raise ConfigError(f"{ROOT}.{kind}: this release attaches drafters only")
    return config


def admit(vllm_config: Any) -> Drafting | None:
    """Check the whole engine configuration; None when no drafter is selected.

    Raises:
        ConfigError: the selection is wrong.
        Unsupported: it is right, but this engine cannot serve it.
    """
    config = read(vllm_config.additional_config, vllm_config.speculative_config)
    if disabled():
        logger.warning("pilotfish: PILOTFISH_DISABLE is set, no plugin is attached")
        return None
    if config.drafter is None:
        return None
    model = vllm_config.model_config.model
    cls, options = plugins().resolve("drafter", config.drafter)
    problem = seams.problem(allow_untested=config.allow_untested_vllm)
    if problem is not None:
        raise Unsupported(cls.name, problem[0], problem[1], model)
    _check_speculation(cls.name, vllm_config)
    engine = describe(vllm_config)
    cls.check(options, engine)

    from . import patches

    patches.COUNTERS.apply()
    return Drafting(cls, options, engine)


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
            plugin, "the V2 model runner takes no custom drafter", "unset VLLM_USE_V2_MODEL_RUNNER", model
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


def start_up_table(drafting: Drafting) -> str:
    """What is attached, as one log message."""
    lines = [
        f"pilotfish: drafter {drafting.cls.name} selected",  # type: ignore[attr-defined]
        f"  origin     {plugins().origin(drafting.cls)}",
        f"  options    {drafting.options}",
        f"  engine     {drafting.engine.model}, vocabulary {drafting.engine.vocab_size}, {drafting.engine.device}, "
        f"{drafting.engine.dtype}, at most {drafting.engine.num_speculative_tokens} drafted tokens a step",
        f"  seams      {len(seams.TABLE)} checked against vLLM {seams.installed_version()}",
    ]
    return "\n".join(lines)
