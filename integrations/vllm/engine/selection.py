"""Plugin selection: read it from an engine's configuration, resolve the plugins, and check that they can be served.

Called in the front-end process before any engine starts, and again by `PilotfishProposer` in the worker.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....kvcache.profiles import model_fingerprint
from ....plugins.config import ROOT, ConfigError, PilotfishConfig, parse_config
from ....plugins.contracts import Engine, KVPolicy, Unsupported
from ....plugins.manager import disabled, plugins
from . import vllm_api


@dataclass(frozen=True)
class Attachment:
    """Selected plugin that the engine can serve.

    Attributes:
        cls: Class of the plugin.
        options: Options of the plugin.
        engine: Facts about the engine.
        config: The whole Pilotfish configuration.
    """

    cls: type
    options: Any
    engine: Engine
    config: PilotfishConfig

    @property
    def name(self) -> str:
        """Name of the plugin."""
        return self.cls.name  # type: ignore[attr-defined]


def is_selected(additional_config: Any, speculative: Any = None) -> bool:
    """Return whether the arguments of an engine contain a Pilotfish configuration or name our proposer."""
    return _key(additional_config) is not None or is_pilotfish_proposer(speculative)


def _key(additional_config: Any) -> Any:
    return additional_config.get(ROOT) if isinstance(additional_config, Mapping) else None


def read_config(additional_config: Any, speculative: Any = None) -> PilotfishConfig:
    """Read the selection and check what needs no engine: names, options, and the two settings of a drafter.

    Args:
        additional_config: vLLM's ``additional_config``, which holds the selection.
        speculative: vLLM's speculative configuration, as a mapping or an object.

    Raises:
        ConfigError: The selection is invalid.
    """
    if disabled():
        return PilotfishConfig()
    value = _key(additional_config)
    config = _parse(json.dumps(value, sort_keys=True)) if value is not None else PilotfishConfig()
    if speculative is not None and is_pilotfish_proposer(speculative) and config.drafter is None:
        raise ConfigError(
            f"{ROOT}.drafter: missing, though --speculative-config names {PROPOSER_CLASS}; "
            'add --additional-config \'{"pilotfish": {"drafter": "token_recycling"}}\''
        )
    return config


@functools.lru_cache(maxsize=8)
def _parse(value: str) -> PilotfishConfig:
    config = parse_config(json.loads(value))
    for kind, selection in config.selected().items():
        plugins().resolve(kind, selection)
    return config


def attach(kind: str, vllm_config: Any) -> Attachment | None:
    """Resolve the selected plugin of a type and run the checks that need no subpackage.

    Args:
        kind: Plugin type.
        vllm_config: vLLM's configuration of the engine.

    Returns:
        The attached plugin, or None if no plugin of this type is selected.

    Raises:
        ConfigError: The selection is invalid.
        Unsupported: vLLM lacks an API that we depend on, or the plugin does not support the engine.
    """
    config = read_config(vllm_config.additional_config, vllm_config.speculative_config)
    selection = config.selected().get(kind)
    if selection is None:
        return None
    cls, options = plugins().resolve(kind, selection)
    problem = vllm_api.version_problem(allow_untested=config.allow_untested_vllm)
    if problem is not None:
        raise Unsupported(cls.name, problem[0], problem[1], vllm_config.model_config.model)  # type: ignore[attr-defined]
    engine = engine_facts(vllm_config)
    cls.check(options, engine)  # type: ignore[attr-defined]
    return Attachment(cls, options, engine, config)


def kv_policy(vllm_config: Any) -> KVPolicy | None:
    """Create the selected KV policy; return None if none is selected."""
    selection = read_config(vllm_config.additional_config).kv
    if selection is None:
        return None
    cls, options = plugins().resolve("kv", selection)
    return cls(options, engine_facts(vllm_config))


def uses_draft_model(vllm_config: Any) -> bool:
    """Return whether the selected drafter uses a draft model that vLLM runs."""
    selection = read_config(vllm_config.additional_config).drafter
    if selection is None:
        return False
    cls, options = plugins().resolve("drafter", selection)
    return cls.needs_draft_model(options)  # type: ignore[attr-defined]


DEVICE_METHOD = "ngram_gpu"  # the method of vLLM whose speculator a device drafter replaces


def uses_device_drafter(vllm_config: Any) -> bool:
    """Return whether a drafter is selected that drafts on the device, for vLLM's V2 model runner."""
    speculative = vllm_config.speculative_config
    return (
        getattr(vllm_config, "use_v2_model_runner", False)
        and getattr(speculative, "method", None) == DEVICE_METHOD
        and read_config(vllm_config.additional_config).drafter is not None
    )


def engine_facts(vllm_config: Any) -> Engine:
    """Return the facts about an engine that plugins receive."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    text = model.hf_text_config
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
        fingerprint=model_fingerprint(text.to_dict()),
        full_attention_layers=full_attention_layers(
            getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None),
            sliding_window=model.get_sliding_window() is not None,
        ),
    )


FULL_ATTENTION = ("full_attention", "attention")  # values of ``layer_types``


def full_attention_layers(types: Any, sliding_window: bool = False) -> tuple[int, ...] | None:
    """Return the layers of a model that attend to all tokens; None if all do, or if their types are not known.

    Args:
        types: ``layer_types`` or ``layers_block_type`` of the language model's configuration; None if it has neither.
        sliding_window: Whether layers without a type have a sliding window.
    """
    if not isinstance(types, Sequence):
        return () if sliding_window else None
    return tuple(i for i, kind in enumerate(types) if kind in FULL_ATTENTION)


PROPOSER_CLASS = "pilotfish.integrations.vllm.PilotfishProposer"


def is_pilotfish_proposer(speculative: Any) -> bool:
    """Return whether a speculative configuration, a mapping or vLLM's object, names our proposer."""
    model = speculative.get("model") if isinstance(speculative, Mapping) else getattr(speculative, "model", None)
    return model == PROPOSER_CLASS
