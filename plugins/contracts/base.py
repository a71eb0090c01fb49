"""Base class of all plugin types, the description of an engine, and the error for an engine that is not supported."""

from dataclasses import dataclass
from typing import Any, ClassVar


class Unsupported(ValueError):  # noqa: N818 -- part of the public contract
    """Error for a selected plugin that cannot serve this engine.

    The message is one line: "PLUGIN does not support model MODEL, layer LAYER: REASON; REMEDY".

    Args:
        plugin: Name of the plugin.
        reason: Why the plugin cannot serve the engine.
        remedy: What the user can do.
        model: Name of the model.
        layer: Index or name of the layer, if the reason concerns a single layer.
    """

    def __init__(self, plugin: str, reason: str, remedy: str, model: str = "any", layer: str = "any") -> None:
        self.plugin, self.model, self.layer, self.reason, self.remedy = plugin, model, layer, reason, remedy
        where = f"model {model}" + ("" if layer == "any" else f", layer {layer}")
        super().__init__(f"{plugin} does not support {where}: {reason}; {remedy}")


@dataclass(frozen=True)
class Engine:
    """The properties of an engine that decide whether a plugin can serve it.

    Attributes:
        model: Name or path of the model.
        vocab_size: Size of the vocabulary.
        max_model_len: Maximum context length, in tokens.
        max_num_seqs: Maximum number of requests in a batch.
        num_speculative_tokens: Maximum number of draft tokens per request and step.
        dtype: Dtype of the model, as in vLLM's option.
        device: Device type, ``cpu`` or ``cuda``.
        tensor_parallel_size: Number of tensor-parallel ranks.
        layers: Number of layers of the language model; 0 if it is not known yet.
        kv_heads: Number of KV heads of a layer, over all tensor-parallel ranks; 0 if it is not known yet.
        fingerprint: Fingerprint of the model's shape, see `kvcache.profiles`; empty if it is not known yet.
        full_attention_layers: Layers that attend to all tokens, ascending; None if all layers do, or if it is not known
            yet. The other layers of a hybrid model have a sliding window, linear attention or a recurrent state.
    """

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_speculative_tokens: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    layers: int = 0
    kv_heads: int = 0
    fingerprint: str = ""
    full_attention_layers: tuple[int, ...] | None = None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that attend to all tokens, ascending; empty if the number of layers is not known yet."""
        return tuple(range(self.layers)) if self.full_attention_layers is None else self.full_attention_layers


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin without options."""


class Plugin:
    """Base class of everything that plugins register.

    Attributes:
        name: Name by which users select the class.
        Options: Frozen dataclass of the options. Pilotfish refuses unknown options and values of a wrong type.
            ``__post_init__`` raises `ValueError` for other invalid values. The ``Attributes:`` section of its docstring
            is the help that `pilotfish plugins NAME` prints.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions

    @classmethod
    def check(cls, options: Any, engine: Engine) -> None:
        """Check that the engine can be served.

        Called when the engine starts; for drafters and KV policies also by `pilotfish serve`. Not called for index
        types and encoders.

        Args:
            options: Instance of ``Options``.
            engine: Properties of the engine.

        Raises:
            Unsupported: The plugin cannot serve this engine with these options.
        """
