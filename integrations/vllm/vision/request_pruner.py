"""Pruner of an image: the engine's, or the one that the request selects if it needs no more tokens."""

import functools
import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ....plugins.config import ConfigError, Selection
from ....plugins.contracts import ImageLayout, PrunePlan, VisualPruner
from ....plugins.manager import plugins

REQUEST_KEY = "pruner"  # in a request's mm_processor_kwargs
CONFIG_KEY = "pilotfish_pruner"  # in the model's configuration, which vLLM passes to the front end and to all workers
LENGTH = 512  # bytes of an encoded selection for the workers; a fixed size, so that images can be batched


def encode_selection(selection: Selection) -> str:
    """Encode a selection as one line of JSON, the same for equal selections."""
    return json.dumps({"name": selection.name, **selection.options}, sort_keys=True)


def decode_selection(text: str) -> Selection:
    """Decode the result of `encode_selection`."""
    options = json.loads(text)
    return Selection(options.pop("name"), options)


@functools.lru_cache(maxsize=256)
def make_pruner(text: str) -> VisualPruner:
    """Create the pruner of an encoded selection; cached.

    Raises:
        ConfigError: The name is unknown, or an option is invalid.
    """
    cls, options = plugins().resolve("pruner", decode_selection(text))
    return cls(options)


def request_options(engine: str, kwargs: Mapping[str, object]) -> str:
    """Return the encoded selection of a request: the engine's, modified by the request's ``pruner``.

    Args:
        engine: Encoded selection of the engine.
        kwargs: ``mm_processor_kwargs`` of the request, where ``pruner`` is a name, options of the engine's pruner, or a
            name with options.

    Raises:
        ConfigError: The request's ``pruner`` is invalid.
    """
    value = kwargs.get(REQUEST_KEY)
    if value is None:
        return engine
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{REQUEST_KEY}: expected a name or an object, got {value!r}")
    if not isinstance(value.get("name", ""), str):
        raise ConfigError(f"{REQUEST_KEY}.name: expected a name, got {value['name']!r}")
    default = decode_selection(engine)
    base = default.options if value.get("name", default.name) == default.name else {}
    try:
        text = encode_selection(decode_selection(json.dumps({"name": default.name, **base, **value})))
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(f"{REQUEST_KEY}: expected values that JSON and UTF-8 can hold") from None
    if make_pruner(text).layer_schedule() != make_pruner(engine).layer_schedule():
        raise ConfigError(
            f"{REQUEST_KEY}: pruning inside the language model is set for the whole engine, not per request"
        )
    if len(text) > LENGTH:
        raise ConfigError(f"{REQUEST_KEY}: name and options take more than {LENGTH} bytes; send fewer options")
    return text


def plan_for_modality(selection: str, layout: ImageLayout, modality: str) -> PrunePlan:
    """Return a pruner's plan for an image or a video; it keeps all tokens of a video if it does not support videos."""
    pruner = make_pruner(selection)
    return pruner.plan(layout) if modality == "image" or pruner.prunes_videos else PrunePlan(layout.num_tokens)


def resolve_selection(engine: str, wanted: str, layout: ImageLayout, modality: str) -> tuple[VisualPruner, PrunePlan]:
    """Return the pruner of an item and its plan: the wanted one, or the engine's if the wanted one needs more tokens.

    vLLM's memory is profiled with the engine's pruner.

    Args:
        engine: Encoded selection of the engine.
        wanted: Encoded selection of the request.
        layout: Layout of the item's visual tokens.
        modality: "image" or "video".
    """
    largest, plan = plan_for_modality(engine, layout, modality), plan_for_modality(wanted, layout, modality)
    return (make_pruner(wanted), plan) if plan.num_tokens <= largest.num_tokens else (make_pruner(engine), largest)


def selection_fingerprint(engine: str, wanted: str) -> str:
    """Return a suffix of cache keys that separates images pruned in different ways."""
    return hashlib.sha256(f"{engine}\n{wanted}".encode()).hexdigest()[:16]


def to_tensor(text: str, count: int) -> Tensor:
    """Convert an encoded selection to a tensor for ``count`` items, [count, LENGTH] uint8."""
    return torch.tensor(list(text.encode().ljust(LENGTH)), dtype=torch.uint8).repeat(count, 1)


def from_tensor(row: Tensor) -> str:
    """Return the encoded selection of a row of `to_tensor`."""
    return bytes(row.tolist()).decode().rstrip()
