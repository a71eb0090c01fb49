"""What all plugins have: a name, options, and an honest no."""

from dataclasses import dataclass
from typing import Any, ClassVar


class Unsupported(ValueError):  # noqa: N818 -- the name of the design
    """A selected plugin cannot serve this engine; the message names plugin, model, layer, reason and remedy."""

    def __init__(self, plugin: str, reason: str, remedy: str, model: str = "any", layer: str = "any") -> None:
        self.plugin, self.model, self.layer, self.reason, self.remedy = plugin, model, layer, reason, remedy
        where = f"model {model}" + ("" if layer == "any" else f", layer {layer}")
        super().__init__(f"{plugin} does not support {where}: {reason}; {remedy}")


@dataclass(frozen=True)
class Engine:
    """The facts about an engine on which support depends."""

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_speculative_tokens: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    layers: int = 0
    kv_heads: int = 0  # of a layer, on all ranks together
    fingerprint: str = ""  # of the model's shape, see `kvcache.profiles`; empty when it is not known yet


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


class Plugin:
    """What every registered class has: a name, and a frozen dataclass of options."""

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions

    @classmethod
    def check(cls, options: Any, engine: Engine) -> None:
        """Raise `Unsupported` when ``options`` cannot be served on ``engine``; called before anything starts."""
