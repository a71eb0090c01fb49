"""A KV policy: every n-th layer keeps all tokens, the layers in between keep sinks and a sliding window.

Gemma and other models are trained with such a mix of global and local layers. This policy imposes it on a model with
full attention only; the KV blocks that fall out of the windows are freed for other requests.
"""

from dataclasses import dataclass
from typing import ClassVar

from pilotfish import Engine, HeadPlan, HeadWindow, KVPolicy, Unsupported, hookimpl


@dataclass(frozen=True)
class LocalGlobalOptions:
    """Options of the example.

    Attributes:
        every: Distance between two layers that keep all tokens; the first layer is one of them.
        window: Number of recent tokens that the other layers keep.
        sinks: Number of first tokens that the other layers keep.
    """

    every: int = 4
    window: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        for name, low in (("every", 2), ("window", 1), ("sinks", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")


class LocalGlobal(KVPolicy):
    """Frees KV blocks: only every n-th layer keeps all tokens."""

    name: ClassVar[str] = "local_global"
    Options: ClassVar[type] = LocalGlobalOptions
    frees_blocks: ClassVar[bool] = True

    @classmethod
    def check(cls, options: LocalGlobalOptions, engine: Engine) -> None:
        """Refuse a model with so few layers that only the first one would keep all tokens."""
        if engine.layers and options.every >= engine.layers:
            reason = f"every={options.every}, but it has {engine.layers} layers"
            raise Unsupported(cls.name, reason, "choose a smaller number", engine.model)

    def __init__(self, options: LocalGlobalOptions, engine: Engine) -> None:
        self.options, self.engine = options, engine

    def head_plan(self) -> HeadPlan:
        """Return the plan: every KV head of a global layer keeps all tokens, as a retrieval head does."""
        everything, nothing = frozenset(range(self.engine.kv_heads)), frozenset()
        layers = (nothing if layer % self.options.every else everything for layer in range(self.engine.layers))
        window = HeadWindow(self.options.sinks, self.options.window, ratio=0, compensation=False, exact_prefill=True)
        return HeadPlan(tuple(layers), window)


@hookimpl
def register_kv_policies(register) -> None:
    """Register the policy."""
    register(LocalGlobal)
