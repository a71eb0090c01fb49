"""Whether a model can be served with a pruner, and how it is given our classes."""

from typing import Any

from ....plugins.config import ROOT, ConfigError, Selection
from ....plugins.contracts import Unsupported, VisualPruner
from ..engine.selection import Attachment
from . import request_pruner

# Names under which vLLM's registry knows our classes, by the model type that they stand for.
CLASSES = {"llava": "PrunedLlava", "llava_next": "PrunedLlavaNext", "llava_onevision": "PrunedLlavaOnevision"}
POSITIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "glm4v")
SELECTS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def check(attachment: Attachment, vllm_config: Any) -> None:
    """Check everything that the selected pruner needs of an engine.

    Raises:
        ConfigError: The selection is in the wrong place.
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
        raise Unsupported(name, "it takes no pictures", "leave the pruner out", model.model)
    if kind in POSITIONS:
        raise Unsupported(
            name,
            f"{kind} gives each patch a position of three dimensions, which vLLM derives from the whole picture; its "
            "hook for other positions is called for its own video pruning only",
            f"use a model of type {', '.join(CLASSES)}",
            model.model,
        )
    if kind not in CLASSES:
        remedy = f"use a model of type {', '.join(CLASSES)}"
        raise Unsupported(name, f"models of type {kind} are not attached", remedy, model.model)
    if tower not in SELECTS:
        raise Unsupported(name, f"its tower is a {tower}", "use one with a CLIP or SigLIP tower", model.model, "tower")
    if config.vision_feature_select_strategy != SELECTS[tower]:
        raise Unsupported(
            name,
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} takes more than patches",
            f"use one with {SELECTS[tower]!r}",
            model.model,
            "tower",
        )
    if not isinstance(config.vision_feature_layer, int):
        raise Unsupported(
            name, "features of several layers are stacked", "use one that takes one layer", model.model, "tower"
        )
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        raise Unsupported(
            name,
            "adapters of the tower expect all views in one batch",
            "leave out --enable-tower-connector-lora",
            model.model,
            "tower",
        )
    if request_pruner.REQUEST_KEY in (model.get_multimodal_config().mm_processor_kwargs or {}):
        raise ConfigError(
            f"--mm-processor-kwargs: '{request_pruner.REQUEST_KEY}' is for requests; the engine's is {ROOT}.pruner in "
            "--additional-config"
        )


def _check_layers(name: str, pruner: VisualPruner, vllm_config: Any) -> None:
    """Check that tokens can leave a prompt inside the language model, where the pruner asks for it."""
    schedule = pruner.layer_schedule()
    if schedule is None:
        return
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = model.hf_text_config.num_hidden_layers
    for present, reason, remedy in (
        (schedule.last > layers, f"the language model has {layers} layers", f"end at {layers} or before"),
        (
            model.hf_text_config.model_type not in ("llama", "mistral", "qwen2"),
            f"layers of {model.hf_text_config.model_type} are not known",
            "use merging alone",
        ),
        (
            vllm_config.device_config.device_type != "cpu",
            "it was built and tested on vLLM's CPU backend alone",
            "use merging alone",
        ),
        (
            vllm_config.scheduler_config.enable_chunked_prefill,
            "a chunk does not know which tokens leave",
            "use --no-enable-chunked-prefill",
        ),
        (
            vllm_config.cache_config.enable_prefix_caching,
            "deep layers keep fewer tokens than a block says",
            "use --no-enable-prefix-caching",
        ),
        (model.runner_type == "pooling", "what is pooled would miss what left", "leave pooling out"),
        (vllm_config.speculative_config is not None, "drafts are verified at every layer", "leave speculation out"),
        (
            not model.enforce_eager,
            "layers run one by one over shapes that change",
            "use --enforce-eager",
        ),
        (
            parallel.pipeline_parallel_size > 1 or parallel.tensor_parallel_size > 1,
            "ranks would have to agree on what leaves",
            "use one rank",
        ),
        (vllm_config.kv_transfer_config is not None, "a KV connector moves whole blocks", "leave the connector out"),
        (vllm_config.lora_config is not None, "adapters expect all tokens at every layer", "leave adapters out"),
    ):
        if present:
            raise Unsupported(name, f"with experimental_layers, {reason}", remedy, model.model)


def install_model_class(selection: Selection, vllm_config: Any) -> None:
    """Give an engine our model class, by names that travel with its configuration to all its processes."""
    model = vllm_config.model_config
    kind = model.hf_config.model_type
    name = f"Pilotfish{CLASSES[kind]}"
    model.model_class_overrides = {
        **model.model_class_overrides,
        name: f"pilotfish.integrations.vllm.vision.models:{CLASSES[kind]}",
    }
    model.hf_config.architectures = [name]
    setattr(model.hf_config, request_pruner.CONFIG_KEY, request_pruner.encode_selection(selection))
