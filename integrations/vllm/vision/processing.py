"""Multimodal processors in the engine's front end: numbers of placeholder tokens, and cache keys per pruner.

Processors are shared by threads, so they keep no state of a request.
"""

import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.model_executor.models.llava_onevision import LlavaOnevisionMultiModalProcessor, LlavaOnevisionProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, VideoEmbeddingItems

from ....plugins.contracts import ImageLayout
from ..engine import metrics
from . import layouts, request_pruner

FIELDS = {"image": "pilotfish_image_pruner", "video": "pilotfish_video_pruner"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
EMBEDDED = (ImageEmbeddingItems, VideoEmbeddingItems)  # sent by the client: not pruned

_rehearsing = contextvars.ContextVar("rehearsing", default=False)  # during memory profiling


class PrunedInfo:
    """Mixin that computes numbers of tokens after pruning; vLLM's class has to follow it in the bases.

    Attributes:
        model: Model type, a key of `layouts.BY_MODEL`.
    """

    model: str
    get_hf_config: Callable[[], Any]

    @property
    def selection(self) -> str:
        """The engine's pruner, encoded by `request_pruner.encode_selection`."""
        return getattr(self.get_hf_config(), request_pruner.CONFIG_KEY)

    def layout(self, modality: str, items: Any, index: int) -> ImageLayout:
        """Return the layout of the visual tokens for one image or video of a request."""
        if modality == "video":
            return layouts.video_layout(self.get_hf_config(), items.get_num_frames(index))
        size = items.get_image_size(index)
        return self.image_layout(size.height, size.width)

    def image_layout(self, height: int, width: int) -> ImageLayout:
        """Return the layout of the visual tokens for an image of this size in pixels.

        Raises:
            RuntimeError: vLLM computes another number of tokens than our layout.
        """
        layout = layouts.BY_MODEL[self.model](self.get_hf_config(), height, width)
        stock = super().get_num_image_tokens(image_width=width, image_height=height)  # type: ignore[misc]
        if stock != layout.num_tokens:
            raise RuntimeError(
                f"pilotfish: model {self.model}: {layout.num_tokens} visual tokens for an image of {width} x {height} "
                f"pixels, vLLM computes {stock}; run without the pruner and report this"
            )
        return layout

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Return the number of tokens of an image after pruning."""
        return request_pruner.plan_for_modality(
            self.selection, self.image_layout(image_height, image_width), "image"
        ).num_tokens

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        """Return the number of tokens of a video, after pruning if the pruner supports videos."""
        del image_width, image_height
        return request_pruner.plan_for_modality(
            self.selection, layouts.video_layout(self.get_hf_config(), num_frames), "video"
        ).num_tokens


class PrunedProcessor:
    """Mixin that sets the number of placeholder tokens after pruning; vLLM's class has to follow it in the bases."""

    info: Any

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return vLLM's dummy inputs without counting their visual tokens."""
        token = _rehearsing.set(True)
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            _rehearsing.reset(token)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        wanted = request_pruner.request_options(self.info.selection, hf_kwargs)
        rest = {key: value for key, value in hf_kwargs.items() if key != request_pruner.REQUEST_KEY}
        processed = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        for modality, pixels in PIXELS.items():
            if pixels in processed:
                processed[FIELDS[modality]] = request_pruner.to_tensor(wanted, len(processed[pixels]))
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        for modality, name in FIELDS.items():
            if PIXELS[modality] in fields:
                fields[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        wanted = request_pruner.request_options(self.info.selection, hf_processor_mm_kwargs)
        for update in updates:
            update.replacement = self._replacement(update, mm_items, wanted)
        return updates

    def _replacement(self, update: Any, mm_items: Any, wanted: str) -> Callable[[int], list[int]]:
        stock, modality, (token,) = update.replacement, update.modality, update.target

        def replace(index: int) -> list[int]:
            items = mm_items[modality]
            if isinstance(items, EMBEDDED):
                return stock(index)
            layout = self.info.layout(modality, items, index)
            return [token] * request_pruner.resolve_selection(self.info.selection, wanted, layout, modality)[
                1
            ].num_tokens

        return replace

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> tuple[list[int], Mapping[str, Any]]:
        prompt, placeholders = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        if not _rehearsing.get():
            for modality, ranges in placeholders.items():
                items = mm_items[modality]
                if not isinstance(items, EMBEDDED):
                    # Items without data are cached; they were counted when they were first sent.
                    indices = [i for i in range(len(ranges)) if items.get(i) is not None]
                    full = sum(self.info.layout(modality, items, i).num_tokens for i in indices)
                    kept = sum(len(ranges[i].tokens) for i in indices)
                    metrics.count_visual_tokens(request_pruner.decode_selection(self.info.selection).name, full, kept)
        return prompt, placeholders

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        wanted = request_pruner.request_options(self.info.selection, inputs.hf_processor_mm_kwargs)
        suffix = request_pruner.selection_fingerprint(self.info.selection, wanted)
        return {modality: [f"{one}-{suffix}" for one in some] for modality, some in hashes.items()}


class LlavaInfo(PrunedInfo, LlavaProcessingInfo):
    """Numbers of tokens for LLaVA-1.5."""

    model = "llava"


class LlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):
    """Numbers of tokens for LLaVA-NeXT."""

    model = "llava_next"


class LlavaOnevisionInfo(PrunedInfo, LlavaOnevisionProcessingInfo):
    """Numbers of tokens for LLaVA-OneVision."""

    model = "llava_onevision"


class LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """Multimodal processor of LLaVA-1.5."""


class LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """Multimodal processor of LLaVA-NeXT."""


class LlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    """Multimodal processor of LLaVA-OneVision."""
