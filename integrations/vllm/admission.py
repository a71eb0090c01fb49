"""Admission checks: whether an engine can serve the selected plugins, decided before it starts."""

from typing import Any

from ...plugins.manager import disabled, plugins
from .attention import compatibility as attention
from .drafting import compatibility as drafting
from .engine.log import logger
from .engine.selection import Attachment, attach, kv_policy, read_config
from .vision import compatibility as vision

CHECKS = {"kv": attention.check, "drafter": drafting.check, "pruner": vision.check}


def admit(vllm_config: Any) -> dict[str, Attachment]:
    """Check the whole engine configuration and return the attached plugins by type.

    If a visual pruner is selected, also set our model class in the configuration.

    Args:
        vllm_config: vLLM's configuration of the engine.

    Raises:
        ConfigError: The selection is invalid.
        Unsupported: The selection is valid, but this engine cannot serve it.
    """
    config = read_config(vllm_config.additional_config, vllm_config.speculative_config)
    if disabled():
        logger.warning("pilotfish: PILOTFISH_DISABLE is set, no plugin is attached")
        return {}
    attached = {}
    for kind, selection in config.selected().items():
        attachment = attach(kind, vllm_config)
        assert attachment is not None
        CHECKS[kind](attachment, vllm_config)
        if kind == "pruner":
            vision.install_model_class(selection, vllm_config)
        attached[kind] = attachment
    return attached


def refusal(vllm_config: Any, params: Any, resumable: bool) -> str | None:
    """Return the reason why the engine cannot serve a request with the selected plugins, or None if it can.

    Args:
        vllm_config: vLLM's configuration of the engine.
        params: Sampling or pooling parameters of the request.
        resumable: Whether the request is part of a streaming session.
    """
    policy = kv_policy(vllm_config) if resumable else None
    if policy is not None and policy.frees_blocks:
        return (
            f"{policy.name}: a streaming session would read KV blocks that were freed; send whole prompts, "
            "or run without the policy"
        )
    selection = read_config(vllm_config.additional_config).pruner
    if selection is not None and getattr(params, "prompt_logprobs", None) is not None:
        cls, options = plugins().resolve("pruner", selection)
        if cls(options).layer_schedule() is not None:
            return f"{cls.name}: prompt_logprobs would lack the pruned tokens; do not request them"  # type: ignore[attr-defined]
    return None
