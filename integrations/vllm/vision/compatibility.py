"""Models and engine settings that a visual pruner cannot serve, and installation of our model classes."""

from typing import Any

from ....plugins.config import ROOT, ConfigError, Selection
from ....plugins.contracts import Unsupported, VisualPruner
from ..engine.selection import Attachment
from . import request_pruner

# Our model classes by the model type that they replace.
CLASSES = {"llava": "PrunedLlava", "llava_next": "PrunedLlavaNext", "llava_onevision": "PrunedLlavaOnevision"}
POSITIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "glm4v")
SELECTS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def check(attachment: Attachment, vllm_config: Any) -> None:
    """Check the model and the engine settings that the selected pruner requires.

    Args:
        attachment: The attached pruner.
        vllm_config: vLLM's configuration of the engine.

    Raises:
        ConfigError: The pruner is set in ``mm_processor_kwargs`` of the engine.
        Unsupported: The model or the engine cannot be served with the pruner.
    """
    _check_model(attachment.name, vllm_config)
    _check_layers(attachment.name, attachment.cls(attachment.options), vllm_config)


def _check_model(name: str, vllm_config: Any) -> None:
    """Check that the model is one of the LLaVA family whose visual tokens can be pruned."""
    model = vllm_config.model_config
    config = model.hf_config
    kind, tower = config.model_type, getattr(getattr(config, "vision_config", None), "model_type", None)
    if not model.is_multimodal_model:
        raise Unsupported(name, "it takes no images", "run without the pruner", model.model)
    if kind in POSITIONS:
        raise Unsupported(
            name,
            f"{kind} gives each patch a three-dimensional position (M-RoPE), which vLLM derives from the whole image; "
            "its hook for other positions is called for its own video pruning only",
            f"use a model of type {', '.join(CLASSES)}",
            model.model,
        )
    if kind not in CLASSES:
        remedy = f"use a model of type {', '.join(CLASSES)}"
        raise Unsupported(name, f"models of type {kind} are not supported", remedy, model.model)
    if tower not in SELECTS:
        raise Unsupported(
            name,
            f"its vision tower is of type {tower}",
            "use a model with a CLIP or SigLIP vision tower",
            model.model,
            "tower",
        )
    if config.vision_feature_select_strategy != SELECTS[tower]:
        raise Unsupported(
            name,
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported",
            f"use a model with {SELECTS[tower]!r}, which selects exactly the patches",
            model.model,
            "tower",
        )
    if not isinstance(config.vision_feature_layer, int):
        raise Unsupported(
            name,
            "vision_feature_layer stacks features of several layers",
            "use a model with a single vision_feature_layer",
            model.model,
            "tower",
        )
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        raise Unsupported(
            name,
            "LoRA adapters of the vision tower expect all views in one batch",
            "omit --enable-tower-connector-lora",
            model.model,
            "tower",
        )
    if request_pruner.REQUEST_KEY in (model.get_multimodal_config().mm_processor_kwargs or {}):
        raise ConfigError(
            f"--mm-processor-kwargs: '{request_pruner.REQUEST_KEY}' is for requests; set the engine's pruner as "
            f"{ROOT}.pruner in --additional-config"
        )


def _check_layers(name: str, pruner: VisualPruner, vllm_config: Any) -> None:
    """Check that visual tokens can be pruned inside the language model, if the pruner asks for it."""
    schedule = pruner.layer_schedule()
    if schedule is None:
        return
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = model.hf_text_config.num_hidden_layers
    for present, reason, remedy in (
        (schedule.last > layers, f"the language model has {layers} layers", f"end at layer {layers} or before"),
        (
            model.hf_text_config.model_type not in ("llama", "mistral", "qwen2"),
            f"decoder layers of type {model.hf_text_config.model_type} are not supported",
            "use merging only",
        ),
        (
            vllm_config.device_config.device_type != "cpu",
            "only vLLM's CPU backend is supported and tested",
            "use merging only",
        ),
        (
            vllm_config.scheduler_config.enable_chunked_prefill,
            "a chunk of a prompt does not determine which tokens are pruned",
            "use --no-enable-chunked-prefill",
        ),
        (
            vllm_config.cache_config.enable_prefix_caching,
            "deeper layers cache fewer tokens than a block holds",
            "use --no-enable-prefix-caching",
        ),
        (model.runner_type == "pooling", "pooling would miss the pruned tokens", "use a generative model"),
        (
            vllm_config.speculative_config is not None,
            "draft tokens are verified at every layer",
            "omit --speculative-config",
        ),
        (
            not model.enforce_eager,
            "the number of tokens changes between layers",
            "use --enforce-eager",
        ),
        (
            parallel.pipeline_parallel_size > 1 or parallel.tensor_parallel_size > 1,
            "ranks would have to agree on the pruned tokens",
            "use one rank",
        ),
        (vllm_config.kv_transfer_config is not None, "a KV connector transfers whole blocks", "disable the connector"),
        (vllm_config.lora_config is not None, "LoRA adapters expect all tokens at every layer", "disable LoRA"),
    ):
        if present:
            raise Unsupported(name, f"with experimental_layers, {reason}", remedy, model.model)


def install_model_class(selection: Selection, vllm_config: Any) -> None:
    """Set our model class and the pruner in an engine's configuration, which vLLM passes to all its processes."""
    model = vllm_config.model_config
    kind = model.hf_config.model_type
    name = f"Pilotfish{CLASSES[kind]}"
    model.model_class_overrides = {
        **model.model_class_overrides,
        name: f"pilotfish.integrations.vllm.vision.models:{CLASSES[kind]}",
    }
    model.hf_config.architectures = [name]
    setattr(model.hf_config, request_pruner.CONFIG_KEY, request_pruner.encode_selection(selection))
