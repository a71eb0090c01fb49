"""What the front of an engine does for a pruner: it announces fewer tokens, and keeps caches apart.

Processors are shared by threads, so that nothing of a request is kept on them.
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
EMBEDDED = (ImageEmbeddingItems, VideoEmbeddingItems)  # made by a tower elsewhere: they pass as they are

_rehearsing = contextvars.ContextVar("rehearsing", default=False)  # while the engine measures its memory


class PrunedInfo:
    """Counts of tokens with the engine's pruner; goes before one of vLLM's classes."""

    model: str  # as `layouts.BY_MODEL` names it
    get_hf_config: Callable[[], Any]

    @property
    def selection(self) -> str:
        """The engine's pruner, see `choice`."""
        return getattr(self.get_hf_config(), request_pruner.CONFIG_KEY)

    def layout(self, modality: str, items: Any, index: int) -> ImageLayout:
        """Of one picture or video of a request."""
        if modality == "video":
            return layouts.video_layout(self.get_hf_config(), items.get_num_frames(index))
        size = items.get_image_size(index)
        return self.image_layout(size.height, size.width)

    def image_layout(self, height: int, width: int) -> ImageLayout:
        """Of a picture of that size.

        Raises:
            RuntimeError: vLLM counts its tokens in another way than we do.
        """
        layout = layouts.BY_MODEL[self.model](self.get_hf_config(), height, width)
        stock = super().get_num_image_tokens(image_width=width, image_height=height)  # type: ignore[misc]
        if stock != layout.num_tokens:
            raise RuntimeError(f"pilotfish: {layout.num_tokens} tokens for {width} x {height}, where vLLM has {stock}")
        return layout

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """After pruning."""
        return request_pruner.plan_for_modality(
            self.selection, self.image_layout(image_height, image_width), "image"
        ).num_tokens

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        """After pruning, where the pruner takes videos."""
        del image_width, image_height
        return request_pruner.plan_for_modality(
            self.selection, layouts.video_layout(self.get_hf_config(), num_frames), "video"
        ).num_tokens


class PrunedProcessor:
    """Announces the tokens that stay; goes before one of vLLM's classes."""

    info: Any

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Pictures that nobody sent are not counted."""
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
            for modality, found in placeholders.items():
                items = mm_items[modality]
                if not isinstance(items, EMBEDDED):
                    # One that is known by its id alone was counted when it came.
                    here = [i for i in range(len(found)) if items.get(i) is not None]
                    full = sum(self.info.layout(modality, items, i).tokens for i in here)
                    kept = sum(len(found[i].tokens) for i in here)
                    metrics.count_visual_tokens(request_pruner.decode_selection(self.info.selection).name, full, kept)
        return prompt, placeholders

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        wanted = request_pruner.request_options(self.info.selection, inputs.hf_processor_mm_kwargs)
        suffix = request_pruner.selection_fingerprint(self.info.selection, wanted)
        return {modality: [f"{one}-{suffix}" for one in some] for modality, some in hashes.items()}


class LlavaInfo(PrunedInfo, LlavaProcessingInfo):
    """LLaVA-1.5."""

    model = "llava"


class LlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):
    """LLaVA-NeXT."""

    model = "llava_next"


class LlavaOnevisionInfo(PrunedInfo, LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision."""

    model = "llava_onevision"


class LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5."""


class LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT."""


class LlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision."""
