"""Engine settings that the selected drafter cannot serve."""

import json
from typing import Any

from ....kvcache.kernels.tree import MAX_DEVICE_NODES
from ....plugins.config import ROOT, ConfigError, PilotfishConfig, Verification
from ....plugins.contracts import Drafter, Engine, Unsupported
from ..attention.compatibility import check_attention
from ..engine import vllm_api
from ..engine.selection import DEVICE_METHOD, PROPOSER_CLASS, Attachment, is_pilotfish_proposer

V1_RUNNER = "set VLLM_USE_V2_MODEL_RUNNER=0"
NO_DEVICE_DRAFTER = "the drafter has no counterpart on the device, which the V2 model runner needs", V1_RUNNER
NO_DEVICE_NODES = (
    "the V2 model runner verifies num_speculative_tokens draft tokens of every request",
    "remove nodes, and set num_speculative_tokens, or " + V1_RUNNER,
)
NO_DEVICE_POLICY = "the V2 model runner runs no KV policy together with a drafter", "remove one, or " + V1_RUNNER
TOO_MANY_NODES = (
    f"trees have at most {MAX_DEVICE_NODES} nodes on the V2 model runner",
    f"set num_speculative_tokens to {MAX_DEVICE_NODES} or less, or {V1_RUNNER}",
)
NO_DEVICE_TREES = "on the V2 model runner the drafter proposes chains only", "use verification=chain, or " + V1_RUNNER
DEVICE_DRAFT_TOKENS = {"chain": (12, 5, 2, 1), "tree": (48, 24, 8, 2)}  # few, since vLLM captures CUDA graphs for each
# A step with fewer tokens reads weights for longer than it computes, in bfloat16 on an A100 (156) to an H100 (295).
MEMORY_BOUND_TOKENS = 192
DRAFT_MODEL_CONFIG = json.dumps({"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 8})


def default_draft_tokens(drafter: Any, verification: Verification) -> int:
    """Return the default of ``num_speculative_tokens``: the maximum number of draft tokens per request and step.

    Args:
        drafter: Class of the drafter.
        verification: Settings of verification.
    """
    if verification.verification == "chain":
        return drafter.default_depth
    return drafter.default_nodes if verification.nodes is None else max(verification.nodes, 1)


def device_speculation(
    drafter: Any, verification: str = "chain", num_speculative_tokens: int | None = None
) -> dict[str, Any]:
    """Return the ``speculative_config`` of a drafter on the V2 model runner.

    There every request of a step has the same number of draft tokens. Up to some number of tokens a step takes the time
    in which the weights are read, so the number of draft tokens follows from the number of requests by default.
    """
    if num_speculative_tokens is not None:
        return {"method": DEVICE_METHOD, "num_speculative_tokens": num_speculative_tokens}
    schedule, first = [], 1
    most = drafter.default_depth if verification == "chain" else drafter.default_nodes
    for tokens in DEVICE_DRAFT_TOKENS[verification]:
        last = MEMORY_BOUND_TOKENS // (tokens + 1)
        schedule.append([first, last, min(tokens, most)])
        first = last + 1
    return {
        "method": DEVICE_METHOD,
        "num_speculative_tokens": schedule[0][2],
        "num_speculative_tokens_per_batch_size": [*schedule, [first, first, 0]],  # the last one holds for more, too
    }


def has_device_drafter(drafter: Any) -> bool:
    """Return whether the class of a drafter has a counterpart on the device."""
    return drafter.device_drafter.__func__ is not Drafter.device_drafter.__func__  # type: ignore[attr-defined]


def device_objection(cls: Any, options: Any, config: PilotfishConfig, engine: Engine) -> str | None:
    """Return why a drafter cannot run on the V2 model runner with these settings; None if it can."""
    if (refusal := _device_refusal(cls, config, engine.num_speculative_tokens)) is not None:
        return refusal[0]
    try:
        cls.check_device(options, engine, config.verification.verification == "tree")
    except Unsupported as error:
        return error.reason
    return None


def _device_refusal(cls: Any, config: PilotfishConfig, num_speculative_tokens: int) -> tuple[str, str] | None:
    """Return why a drafter's settings do not suit the V2 model runner, and the remedy; None if they do."""
    if not has_device_drafter(cls):
        return NO_DEVICE_DRAFTER
    if config.verification.nodes is not None:
        return NO_DEVICE_NODES
    if config.kv is not None:
        return NO_DEVICE_POLICY
    if config.verification.verification == "tree" and num_speculative_tokens > MAX_DEVICE_NODES:
        return TOO_MANY_NODES
    return None


def uses_device(cls: Any, options: Any, config: PilotfishConfig, engine: Engine) -> bool:
    """Return whether `pilotfish serve` composes a command for the V2 model runner.

    If the environment selects no model runner, it does so where vLLM would run the model on it, and the drafter can.
    """
    setting = vllm_api.model_runner_setting()
    if setting is not None or cls.needs_draft_model(options):
        return bool(setting)
    return vllm_api.is_gpu_build() and device_objection(cls, options, config, engine) is None


def check(attachment: Attachment, vllm_config: Any) -> None:
    """Check the engine settings that the selected drafter requires.

    Args:
        attachment: The attached drafter.
        vllm_config: vLLM's configuration of the engine.

    Raises:
        ConfigError: The engine would not call the drafter, since ``speculative_config`` is missing or does not name it.
        Unsupported: The engine cannot serve the drafter.
    """
    _check_speculation(attachment.cls, attachment.options, attachment.config, vllm_config)
    trees = attachment.config.verification.verification == "tree"
    if getattr(vllm_config, "use_v2_model_runner", False):
        attachment.cls.check_device(attachment.options, attachment.engine, trees)
    if trees:
        _check_trees(attachment.name, attachment.config, vllm_config)
    _check_tokenizer(attachment.cls, attachment.options, vllm_config.model_config)


def _check_speculation(cls: Any, options: Any, config: PilotfishConfig, vllm_config: Any) -> None:
    """Check that the engine calls the drafter, and that nothing in it changes the output distribution."""
    plugin, speculative, model = cls.name, vllm_config.speculative_config, vllm_config.model_config.model
    if cls.needs_draft_model(options):
        _check_draft_model(plugin, config, vllm_config)
    elif getattr(vllm_config, "use_v2_model_runner", False):
        _check_device_drafter(cls, config, vllm_config)
    elif speculative is None or not is_pilotfish_proposer(speculative) or speculative.method != "custom_class":
        tokens = default_draft_tokens(cls, config.verification)
        value = json.dumps({"method": "custom_class", "model": PROPOSER_CLASS, "num_speculative_tokens": tokens})
        how = f"add --speculative-config '{value}'"
        if getattr(speculative, "method", None) == DEVICE_METHOD:  # composed for the V2 model runner
            how = f"vLLM runs this model on its V1 model runner; {V1_RUNNER}, or --speculative-config '{value}'"
        raise ConfigError(f"{ROOT}.drafter: {plugin} is selected but the engine would not call it; {how}")
    if getattr(speculative, "rejection_sample_method", "standard") not in ("standard", "block"):
        raise Unsupported(
            plugin,
            f"rejection_sample_method={speculative.rejection_sample_method!r} changes the output distribution",
            "remove it from --speculative-config",
            model,
        )
    if getattr(speculative, "draft_sample_method", "greedy") != "greedy":
        raise Unsupported(
            plugin,
            f"draft_sample_method={speculative.draft_sample_method!r} needs the probabilities of draft tokens, "
            "which the verifier does not have",
            "remove it from --speculative-config",
            model,
        )
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise Unsupported(plugin, "prompts given as embeddings have no tokens", "omit --enable-prompt-embeds", model)
    if vllm_config.model_config.runner_type == "pooling":
        raise Unsupported(plugin, "pooling models generate no tokens", "run without the drafter", model)


def _check_device_drafter(cls: Any, config: PilotfishConfig, vllm_config: Any) -> None:
    """Check that the V2 model runner calls the drafter's counterpart on the device, and that there is one."""
    plugin, speculative, model = cls.name, vllm_config.speculative_config, vllm_config.model_config.model
    tokens = getattr(speculative, "num_speculative_tokens", None) or 0
    if (refusal := _device_refusal(cls, config, tokens)) is not None:
        raise Unsupported(plugin, *refusal, model)
    if speculative is None or speculative.method != DEVICE_METHOD:
        value = json.dumps(device_speculation(cls, config.verification.verification))
        raise ConfigError(
            f"{ROOT}.drafter: {plugin} is selected but the V2 model runner would not call it; "
            f"set --speculative-config '{value}', or {V1_RUNNER}"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise Unsupported(
            plugin,
            "each rank would see the logits of its own requests only",
            "omit --enable-batch-sharded-sampling",
            model,
        )
    if config.verification.verification == "tree":
        _check_device_trees(plugin, vllm_config)


def _check_device_trees(plugin: str, vllm_config: Any) -> None:
    """Check what the V2 model runner needs in addition to verify trees."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative.enable_adaptive_verification:
        raise Unsupported(
            plugin,
            "adaptive verification truncates chains, and the draft tokens form trees",
            "remove enable_adaptive_verification from --speculative-config, or use verification=chain",
            model.model,
        )
    if getattr(model, "return_sampling_mask", False):
        raise Unsupported(
            plugin, "sampling masks are returned for chains only", "omit --return-sampling-mask", model.model
        )


def _check_draft_model(plugin: str, config: PilotfishConfig, vllm_config: Any) -> None:
    """Check that the engine runs a draft model in the way that the drafter requires."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config.model
    if speculative is None or speculative.method != "draft_model":
        raise ConfigError(
            f"{ROOT}.drafter: {plugin} builds on a draft model; add --speculative-config '{DRAFT_MODEL_CONFIG}'"
        )
    if getattr(vllm_config, "use_v2_model_runner", False):
        raise Unsupported(plugin, "the V2 model runner's draft models take no second drafter", V1_RUNNER, model)
    if vllm_config.scheduler_config.async_scheduling:
        raise Unsupported(
            plugin, "steps are scheduled before the draft tokens are known", "use --no-async-scheduling", model
        )
    if config.verification.verification == "tree":
        raise Unsupported(
            plugin, "the draft model's cache does not support trees", "use verification=chain, or another base", model
        )


def _check_tokenizer(cls: Any, options: Any, model_config: Any) -> None:
    """Check that the token ids of a drafter come from a tokenizer with the model's vocabulary.

    Raises:
        Unsupported: The vocabularies differ.
    """
    if (expected := cls.tokenizer(options)) is None:
        return
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    from ....plugins.drafting.datastore import vocabulary_fingerprint

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is not None and vocabulary_fingerprint(tokenizer.get_vocab()) != expected[0]:
        raise Unsupported(
            cls.name,
            f"its token ids are those of another tokenizer ({expected[1]})",
            "build the datastore with --tokenizer of the served model",
            model_config.model,
        )


def _check_trees(plugin: str, config: PilotfishConfig, vllm_config: Any) -> None:
    """Check that draft trees can be verified."""
    model = vllm_config.model_config
    for present, reason in (
        (config.kv is not None, "tree verification does not work together with a KV policy"),
        (
            getattr(model, "uses_mrope", False),
            "tree verification does not support multi-dimensional positions (M-RoPE)",
        ),
        (getattr(model, "is_hybrid", False), "hybrid models cannot roll back the recurrent state of a rejected branch"),
        (vllm_config.kv_transfer_config is not None, "a KV connector may read keys and values before they are moved"),
    ):
        if present:
            raise Unsupported(plugin, reason, "use verification=chain", model.model)
    try:
        check_attention(plugin, vllm_config)
    except Unsupported as error:
        raise Unsupported(plugin, error.reason, "use verification=chain", model.model) from None
