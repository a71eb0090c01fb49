"""RazorAttention (arXiv 2407.15891): most heads of a model keep a window, and the memory of the rest is free again.

A few KV heads ("retrieval heads") look far back and keep every key and value. The others keep sinks and a window of
latest positions; one compensation token stands for what they drop:

    L = max(window, N / ratio)
    keep the first ``sinks`` positions and the last L; D = the positions between them, |D| = Nd
    k^ = mean key of D, v^ = mean value of D
    attention gets one more slot (k^, v^) whose logit is increased by log(Nd)

Blocks that a head drops go back to the engine's pool at the next step, where other requests take them. Prompts are read
with full attention (``prefill=exact``, as in the paper) or window by window (``streaming``, bounded memory).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..kvcache import retrieval_heads
from ..kvcache.head_window import HeadPlan, HeadWindow
from ..kvcache.retrieval_heads import LayerHead
from . import compiler_check, profile_option
from .config import ConfigError
from .contracts import Engine, KVPolicy, Unsupported
from .hookspecs import Register, hookimpl

TUNE = "pilotfish tune razor"


@dataclass(frozen=True)
class RazorAttentionOptions:
    """Options of RazorAttention.

    Attributes:
        profile: Scores of the model's heads: ``FILE.json`` from `pilotfish tune razor`; the shipped ones if not given.
        keep: Share of the KV heads that keep everything, by their scores, or the heads themselves as
            ``[[layer, head], ...]``. A share is rounded up where that costs no memory.
        sinks: First positions, always kept; whole blocks are.
        window: Latest positions that the others keep at least (S0).
        ratio: The window grows to 1/ratio of the text (C); 0: it does not grow.
        protect_layers: First layers all of whose heads keep everything.
        compensation: One more position stands for what is dropped.
        prefill: ``exact``: a prompt is read with full attention, and its blocks are freed behind it. ``streaming``: the
            window holds while it is read too.
    """

    profile: str | None = None
    keep: float | tuple[tuple[int, ...], ...] = 0.15
    sinks: int = 4
    window: int = 512
    ratio: int = 5
    protect_layers: int = 0
    compensation: bool = True
    prefill: Literal["exact", "streaming"] = "exact"

    def __post_init__(self) -> None:
        for name, low in (("sinks", 0), ("window", 1), ("ratio", 0), ("protect_layers", 0)):
            value = getattr(self, name)
            if not low <= value <= 1 << 24:
                raise ValueError(f"{name}: expected {low} to {1 << 24}, got {value}")
        if isinstance(self.keep, float | int):
            if not 0 < self.keep <= 1:
                raise ValueError(f"keep: expected a share above 0, up to 1, got {self.keep}")
        elif not self.keep or any(len(pair) != 2 or min(pair) < 0 for pair in self.keep):  # a layer and a head
            raise ValueError(f"keep: expected pairs [layer, head], got {[list(pair) for pair in self.keep]}")
        elif self.profile is not None:
            raise ValueError("profile: given beside heads; leave one out")

    @property
    def head_window(self) -> HeadWindow:
        """What windowed heads keep."""
        return HeadWindow(self.sinks, self.window, self.ratio, self.compensation, self.prefill == "exact")


class RazorAttention(KVPolicy):
    """The policy: which heads keep everything, and the window of the others."""

    name: ClassVar[str] = "razor_attention"
    Options: ClassVar[type] = RazorAttentionOptions
    frees_blocks: ClassVar[bool] = True

    @classmethod
    def check(cls, options: RazorAttentionOptions, engine: Engine) -> None:
        """Refuse a model without a profile, heads of another model, and a machine that cannot compile the kernels."""
        if not (engine.kv_heads and engine.fingerprint):  # not known before the engine is configured
            return
        for layer, head in resolve_retrieval_heads(options, engine):
            if layer >= engine.layers or head >= engine.kv_heads:
                raise Unsupported(
                    cls.name,
                    f"keep names its head {head}, but the model has layers 0 to {engine.layers - 1} "
                    f"and KV heads 0 to {engine.kv_heads - 1}",
                    "choose heads of this model",
                    engine.model,
                    str(layer),
                )
        compiler_check.require_compiler(cls.name, engine)

    def __init__(self, options: RazorAttentionOptions, engine: Engine) -> None:
        self.options, self.engine = options, engine

    def head_plan(self) -> HeadPlan:
        """The heads of every layer that keep everything, and the window of the others."""
        pairs = resolve_retrieval_heads(self.options, self.engine)
        whole = tuple(frozenset(h for at, h in pairs if at == layer) for layer in range(self.engine.layers))
        return HeadPlan(whole, self.options.head_window)


def resolve_retrieval_heads(options: RazorAttentionOptions, engine: Engine) -> list[LayerHead]:
    """The KV heads that keep everything: named, or by the scores of a profile.

    Raises:
        ConfigError: the profile cannot be read.
        Unsupported: there is none for this model, or it is of another one.
    """
    if isinstance(options.keep, tuple):
        first = range(min(options.protect_layers, engine.layers))
        protected = ((layer, head) for layer in first for head in range(engine.kv_heads))
        return list(dict.fromkeys([*((layer, head) for layer, head in options.keep), *protected]))
    found = profile_option.resolve_profile_option(RazorAttention.name, options.profile, engine, TUNE)
    if found is None:
        raise Unsupported(
            RazorAttention.name,
            "no profile of its heads is shipped",
            f"run `{TUNE}` for this model, and name the file in profile",
            engine.model,
        )
    shape = (engine.layers, engine.kv_heads)
    try:
        echo, induction = (np.asarray(found[name], np.float64) for name in ("echo", "induction"))
        if not echo.shape == induction.shape == shape or not np.isfinite(echo + induction).all():
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            f"pilotfish.kv.profile: echo and induction are expected as {shape[0]} lists of {shape[1]} numbers"
        ) from None
    return retrieval_heads.select_retrieval_heads(echo, induction, options.keep, options.protect_layers)


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(RazorAttention)
