"""Vision tower and projector of a model, without language model and engine: used to visualise pruning."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....plugins.config import ConfigError
from ....plugins.contracts import ImageFeatures, ImageLayout
from ....plugins.pruning import grids
from . import layouts
from .patch_scores import mean_dissimilarity

PREFIXES = ("vision_tower.", "multi_modal_projector.", "image_newline")


class VisionEncoder:
    """Vision encoder and projector of a LLaVA checkpoint, in plain torch and transformers.

    Args:
        folder: Folder of a LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision checkpoint with safetensors.

    Raises:
        ConfigError: The folder holds no such checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModel, AutoProcessor
        from transformers.activations import ACT2FN

        try:
            self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {folder}: {str(error).splitlines()[0]}") from None
        if self.config.model_type not in layouts.BY_MODEL:
            raise ConfigError(
                f"model {folder}: of type {self.config.model_type}, expected {', '.join(layouts.BY_MODEL)}"
            )
        if not isinstance(self.config.vision_feature_layer, int):
            raise ConfigError(f"model {folder}: vision_feature_layer stacks features of several layers")
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        weights = _weights(folder)
        self.tower: Any = AutoModel.from_config(self.config.vision_config, attn_implementation="sdpa").eval().float()
        inside = {k.removeprefix("vision_tower."): v for k, v in weights.items() if k.startswith("vision_tower.")}
        if not any(k.startswith("vision_model.") for k in self.tower.state_dict()):
            inside = {k.removeprefix("vision_model."): v for k, v in inside.items()}
        missing = self.tower.load_state_dict(inside, strict=False).missing_keys
        if any("encoder.layers" in k for k in missing):
            raise ConfigError(f"model {folder}: the vision tower lacks {missing[0]}")
        first, second = (weights[f"multi_modal_projector.linear_{i}.weight"] for i in (1, 2))
        act = ACT2FN[self.config.projector_hidden_act]
        self.projector = nn.Sequential(nn.Linear(*first.shape[::-1]), act, nn.Linear(*second.shape[::-1])).eval()
        for i, layer in ((1, self.projector[0]), (2, self.projector[2])):
            assert isinstance(layer, nn.Linear)
            layer.weight.data = weights[f"multi_modal_projector.linear_{i}.weight"]
            bias = weights.get(f"multi_modal_projector.linear_{i}.bias")
            layer.bias.data = torch.zeros(len(layer.weight)) if bias is None else bias
        self.newline = weights.get("image_newline")

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return the layout of the visual tokens for an image of this size in pixels."""
        return layouts.BY_MODEL[self.config.model_type](self.config, height, width)

    @torch.inference_mode()
    def encode(self, image: Any) -> tuple[ImageLayout, ImageFeatures, Tensor]:
        """Encode a PIL image.

        Args:
            image: The image, in RGB.

        Returns:
            Layout of its visual tokens, the tokens with their scores, and the features of the vision tower
            [views, side * side, width].
        """
        layout = self.layout(image.height, image.width)
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        pixels = pixels[0] if pixels.dim() == 5 else pixels
        hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        at = range(len(hidden))[self.config.vision_feature_layer]
        features, scores = hidden[at], None
        if self.config.vision_config.model_type == "clip_vision_model":
            scores, features = self._cls(hidden, at), features[:, 1:]
        else:
            scores = mean_dissimilarity(features)
        embedded = self.projector(features)
        return layout, ImageFeatures(self._assemble(layout, embedded), scores), features

    def _cls(self, hidden: tuple[Tensor, ...], at: int) -> Tensor:
        """Compute the same as `patch_scores.cls_logits`, on layers of transformers."""
        layers = getattr(self.tower, "vision_model", self.tower).encoder.layers
        layer, entering = (layers[at], hidden[at]) if at < len(layers) else (layers[-1], hidden[-2])
        normed, attention = layer.layer_norm1(entering), layer.self_attn
        heads = (attention.num_heads, attention.head_dim)
        query = attention.q_proj(normed[:, 0]).unflatten(-1, heads)
        key = attention.k_proj(normed[:, 1:]).unflatten(-1, heads)
        return torch.einsum("vhd,vphd->vp", query, key) * (attention.scale / attention.num_heads)

    def _assemble(self, layout: ImageLayout, embedded: Tensor) -> Tensor:
        first = embedded[: layout.frames].flatten(0, 1)
        if not layout.crops[0]:
            return first
        grid = grids.stitch_crops(layout, embedded)
        if layout.row_newlines:
            assert self.newline is not None
            grid = torch.cat([grid, self.newline.expand(len(grid), 1, -1)], 1)
        return torch.cat([first, grid.flatten(0, 1)])


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of vision tower and projector in float32, by names without ``model.``."""
    from safetensors import safe_open

    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping
                if (short := name.removeprefix("model.")).startswith(PREFIXES):
                    weights[short] = file.get_tensor(name).float()
    if not any(name.startswith("vision_tower.") for name in weights):
        raise ConfigError(f"model {folder}: no safetensors with a vision tower")
    return weights
