"""vLLM's LLaVA models with a pruner between their projector and their language model.

Each is a subclass of vLLM's class that replaces the step in which the tokens of an image are assembled. The subclasses
are registered under separate names, so that other engines in the same process use vLLM's classes.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....plugins.contracts import ImageFeatures, ImageLayout
from ..engine import log
from . import layouts, processing, request_pruner
from .patch_scores import ClsAttentionScorer, mean_dissimilarity

TOWER_VIEWS = 16  # views per call of the vision tower: the scheduler counts pruned tokens, and so admits many views


class PrunedModel:
    """Mixin for all models; vLLM's class has to follow it in the bases.

    Attributes:
        model: Model type, a key of `layouts.BY_MODEL`.
    """

    model: ClassVar[str]
    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._engine: str = getattr(self.config, request_pruner.CONFIG_KEY)
        self._wanted: dict[str, list[str]] = {}  # pruner of each item by modality, during `embed_multimodal`
        self._scorer = None
        if isinstance(self.vision_tower, CLIPVisionModel):  # not if images are disabled
            tower = f"{prefix}.vision_tower".removeprefix(".")
            with self._mark_tower_model(vllm_config, "image"):  # type: ignore[attr-defined]
                scorer = ClsAttentionScorer(
                    self.vision_tower, self.config.vision_config, vllm_config.quant_config, tower
                )
            self._scorer = scorer
        self._inside = self._visual = None
        schedule = request_pruner.make_pruner(self._engine).layer_schedule()
        if schedule is not None:
            from .layer_pruning import LayerPruning

            model = self.language_model.model  # type: ignore[attr-defined]
            self._inside = LayerPruning(model.layers, model.norm, schedule, vllm_config)
        log.announce_pruner(vllm_config)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """Embed the tokens of a step, and keep the mask of visual tokens until its `forward`."""
        self._visual = is_multimodal if multimodal_embeddings else None
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Any,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> Any:
        """Run vLLM's forward pass, or ours for prompts whose visual tokens are pruned inside the language model."""
        if self._inside is not None and inputs_embeds is not None:
            hidden = self._inside.forward(positions, inputs_embeds, self._visual)
            if hidden is not None:
                return hidden
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)  # type: ignore[misc]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images and videos, and prune their tokens to the number of placeholder tokens."""
        for modality, field in processing.FIELDS.items():
            rows = kwargs.pop(field, ())
            self._wanted[modality] = [request_pruner.from_tensor(row) for row in rows]
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _process_image_input(self, image_input: Any) -> Sequence[Tensor]:
        if image_input["type"] == "image_embeds":  # embeddings that the client sent are not pruned
            return super()._process_image_input(image_input)  # type: ignore[misc]
        sizes = image_input.get("image_sizes")
        pruned = []
        for i, pixels in enumerate(image_input["pixel_values"]):
            height, width = (0, 0) if sizes is None else (int(n) for n in sizes[i])
            layout = layouts.BY_MODEL[self.model](self.config, height, width)
            pruner, plan = request_pruner.resolve_selection(self._engine, self._wanted["image"][i], layout, "image")
            features, scores = self._see(pixels if pixels.dim() == 4 else pixels[None], pruner.needs_scores)
            tokens = self._assemble(self.multi_modal_projector(features), None if sizes is None else sizes[i])
            pruned.append(prune_features(pruner, layout, plan, ImageFeatures(tokens, scores)))
        return pruned

    def _see(self, pixels: Tensor, scored: bool) -> tuple[Tensor, Tensor | None]:
        """Run the vision tower on at most `TOWER_VIEWS` views at a time.

        Args:
            pixels: [views, 3, height, width].
            scored: Whether to compute patch scores.

        Returns:
            Features [views, patches, width], and patch scores [views, patches] or None.
        """
        scorer = self._scorer
        if scorer is not None:
            scorer.begin(scored)
        parts = [self._image_pixels_to_features(self.vision_tower, part) for part in pixels.split(TOWER_VIEWS)]  # type: ignore[attr-defined]
        features = torch.cat(parts)
        if not scored:
            return features, None
        return features, mean_dissimilarity(features) if scorer is None else scorer.take()

    def _assemble(self, embedded: Tensor, size: Tensor | None) -> Tensor:
        """Assemble the tokens of an image as vLLM does, from its embedded views [views, patches, width]."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _assemble")


def prune_features(pruner: Any, layout: ImageLayout, plan: Any, features: ImageFeatures) -> Tensor:
    """Prune the visual tokens of an image.

    Args:
        pruner: The pruner.
        layout: Layout of the visual tokens.
        plan: The pruner's plan for this layout.
        features: Visual tokens and scores of the image.

    Returns:
        [plan.num_tokens, width] tokens for the language model.

    Raises:
        RuntimeError: The pruner returned another number of tokens than it planned, or the layout does not match the
            tokens that vLLM assembled.
    """
    if len(features.tokens) != layout.num_tokens:
        raise RuntimeError(
            f"pilotfish: vLLM assembled {len(features.tokens)} visual tokens for the model, the layout has "
            f"{layout.num_tokens}; run without the pruner and report this"
        )
    kept = pruner.apply(layout, plan, features)
    if len(kept) != plan.num_tokens:
        raise RuntimeError(
            f"pilotfish: pruner {pruner.name} planned {plan.num_tokens} visual tokens and kept "
            f"{len(kept)}; use another one"
        )
    return kept


@MULTIMODAL_REGISTRY.register_processor(
    processing.LlavaProcessor, info=processing.LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):
    """LLaVA-1.5 with pruning of visual tokens."""

    model = "llava"

    def _assemble(self, embedded: Tensor, size: Tensor | None) -> Tensor:
        return embedded[0]

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int]:
        """Return the number of tokens that vision tower and projector process for an image: all, unpruned."""
        tokens = layouts.single_view(self.config, 0, 0).num_tokens
        return tokens, tokens


@MULTIMODAL_REGISTRY.register_processor(
    processing.LlavaNextProcessor, info=processing.LlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNext(PrunedModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with pruning of visual tokens."""

    model = "llava_next"

    def _assemble(self, embedded: Tensor, size: Tensor | None) -> Tensor:
        assert size is not None
        return self._merge_image_patch_embeddings(size, embedded, strategy="spatial_unpad")


@MULTIMODAL_REGISTRY.register_processor(
    processing.LlavaOnevisionProcessor,
    info=processing.LlavaOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with pruning of visual tokens, including video frames if the pruner supports them."""

    model = "llava_onevision"

    def _assemble(self, embedded: Tensor, size: Tensor | None) -> Tensor:
        assert size is not None
        return self._merge_image_patch_embeddings(
            size, embedded, image_newline=self.image_newline, strategy="spatial_unpad"
        )

    def _process_video_pixels(self, inputs: Any) -> Sequence[Tensor]:
        pruned = []
        if self._scorer is not None:
            self._scorer.begin(False)
        for video, wanted in zip(inputs["pixel_values_videos"], self._wanted["video"], strict=True):
            parts = [self._video_pixels_to_features(self.vision_tower, part) for part in video.split(TOWER_VIEWS)]
            tokens = torch.cat([torch.cat(parts).flatten(0, 1), self.image_newline[None]])
            layout = layouts.video_layout(self.config, len(video))
            pruner, plan = request_pruner.resolve_selection(self._engine, wanted, layout, "video")
            unpruned = plan.num_tokens == layout.num_tokens
            pruned.append(tokens if unpruned else prune_features(pruner, layout, plan, ImageFeatures(tokens)))
        return pruned
