"""Which pruner a picture gets: the engine's, or what its request asks for within the room that the engine has."""

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
CONFIG_KEY = "pilotfish_pruner"  # in the model's configuration, which reaches the front and all workers
LENGTH = 512  # bytes that carry a choice to the workers, one size for all so that pictures can be batched


def encode_selection(selection: Selection) -> str:
    """A selection as one line of JSON that is the same for equal selections."""
    return json.dumps({"name": selection.name, **selection.options}, sort_keys=True)


def decode_selection(text: str) -> Selection:
    """What `encode` wrote."""
    options = json.loads(text)
    return Selection(options.pop("name"), options)


@functools.lru_cache(maxsize=256)
def make_pruner(text: str) -> VisualPruner:
    """The pruner that a selection names, made once.

    Raises:
        ConfigError: there is none of that name, or its options are wrong.
    """
    cls, options = plugins().resolve("pruner", decode_selection(text))
    return cls(options)


def request_options(engine: str, kwargs: Mapping[str, object]) -> str:
    """What a request gets: the engine's selection, changed by the request's ``pruner``.

    That is a name, options of the engine's pruner, or a name with options.

    Raises:
        ConfigError: it cannot be used.
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
        raise ConfigError(f"{REQUEST_KEY}: not what JSON and UTF-8 can hold") from None
    if make_pruner(text).layer_schedule() != make_pruner(engine).layer_schedule():
        raise ConfigError(f"{REQUEST_KEY}: what happens inside the language model is for the engine to choose")
    if len(text) > LENGTH:
        raise ConfigError(f"{REQUEST_KEY}: more than {LENGTH} bytes")
    return text


def plan_for_modality(selection: str, layout: ImageLayout, modality: str) -> PrunePlan:
    """What a pruner makes of a picture or a video; a video stays whole where it takes none."""
    chosen = make_pruner(selection)
    return chosen.plan(layout) if modality == "image" or chosen.prunes_videos else PrunePlan(layout.num_tokens)


def resolve_selection(engine: str, wanted: str, layout: ImageLayout, modality: str) -> tuple[VisualPruner, PrunePlan]:
    """The pruner and its plan; the engine's where the wanted one would need more room than that.

    The engine's memory was measured with its own pruner.
    """
    most, own = plan_for_modality(engine, layout, modality), plan_for_modality(wanted, layout, modality)
    return (make_pruner(wanted), own) if own.num_tokens <= most.num_tokens else (make_pruner(engine), most)


def selection_fingerprint(engine: str, wanted: str) -> str:
    """What keeps pictures apart in caches that were pruned in different ways."""
    return hashlib.sha256(f"{engine}\n{wanted}".encode()).hexdigest()[:16]


def to_tensor(text: str, count: int) -> Tensor:
    """A choice for each of some pictures, [count, LENGTH] bytes."""
    return torch.tensor(list(text.encode().ljust(LENGTH)), dtype=torch.uint8).repeat(count, 1)


def from_tensor(row: Tensor) -> str:
    """A choice from its bytes."""
    return bytes(row.tolist()).decode().rstrip()
