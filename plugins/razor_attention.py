"""RazorAttention: KV cache compression through retrieval heads (arXiv 2407.15891).

Few KV heads, the *retrieval heads*, attend to the whole context. They keep every key and value. All other heads keep
attention sinks and a window of recent tokens; one compensation token represents the tokens that they drop (section
3.3):

    N tokens so far, N0 sinks, L = max(S0, N / C)
    a non-retrieval head keeps the first N0 tokens and the last L; D = the tokens in between, |D| = Nd
    k^ = mean key of D, v^ = mean value of D
    attention gets one more slot (k^, v^), whose logit is increased by log(Nd)

Retrieval heads are found without data (section 3.2): the model reads one block of random tokens four times over. A head
that attends to an earlier copy of its token (echo head), or to the token that followed an earlier copy (induction
head), is a retrieval head.

KV blocks that a head drops are freed at the next step, for other requests. Prompts are processed with full attention
(``prefill=exact``, as in the paper) or with the window (``prefill=streaming``, bounded memory). Tokens are dropped in
whole blocks, so a window is up to one block longer than L. Not implemented: the paper's windows for ALiBi models.

The static methods of `RazorAttention` are the float64 reference of the kernels in ``kvcache/kernels/head_cache.cpp``
and ``kvcache/kernels/programs_heads_triton.py``, and of the chunked `kvcache.retrieval_heads.head_scores`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..kvcache.head_window import HeadPlan, HeadWindow
from ..kvcache.reference import Float64, softmax
from ..kvcache.retrieval_heads import LayerHead, select_retrieval_heads
from . import compiler_check, profile_option
from .config import ConfigError
from .contracts import Engine, KVPolicy, Unsupported
from .hookspecs import Register, hookimpl

TUNE = "pilotfish tune razor"


@dataclass(frozen=True)
class RazorAttentionOptions:
    """Options of RazorAttention.

    Attributes:
        profile: Scores of the model's heads: ``FILE.json`` from `pilotfish tune razor`; the shipped profile if not
            given.
        keep: Share of the KV heads that are retrieval heads, taken by their scores, or the heads themselves as
            ``[[layer, head], ...]``. A share is rounded up where this costs no memory.
        sinks: Number of first tokens that non-retrieval heads keep (N0 in the paper); whole blocks are kept.
        window: Smallest number of recent tokens that non-retrieval heads keep (S0 in the paper).
        ratio: The window grows to 1/ratio of the context (C in the paper); 0 for a window that does not grow.
        protect_layers: Number of first layers in which every head is a retrieval head.
        compensation: Whether a compensation token represents the dropped tokens.
        prefill: ``exact`` processes a prompt with full attention and frees its blocks afterwards; ``streaming`` applies
            the window during the prompt too.
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
            raise ValueError("profile: given together with heads in keep; leave one out")

    @property
    def head_window(self) -> HeadWindow:
        """The window of non-retrieval heads that these options describe."""
        return HeadWindow(self.sinks, self.window, self.ratio, self.compensation, self.prefill == "exact")


class RazorAttention(KVPolicy):
    """Frees KV blocks: only retrieval heads keep all tokens.

    The policy decides which heads are retrieval heads, and what the other heads keep.
    """

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
        self.options = options
        self.engine = engine

    def head_plan(self) -> HeadPlan:
        """Return the retrieval heads of every layer, and the window of the other heads."""
        heads = resolve_retrieval_heads(self.options, self.engine)
        by_layer = tuple(frozenset(h for at, h in heads if at == layer) for layer in range(self.engine.layers))
        return HeadPlan(by_layer, self.options.head_window)

    # ---------------------------------------------------------------------------------- the algorithm, in NumPy

    @staticmethod
    def head_scores(query: NDArray, key: NDArray, scale: float, period: int) -> tuple[Float64, Float64]:
        """Score the query heads of one layer by how much they attend to earlier copies of a token (section 3.2).

        Args:
            query: [tokens, num_heads, head_size] of one start token and equal blocks of random tokens, with positions.
            key: [tokens, num_kv_heads, head_size].
            scale: Softmax scale.
            period: Length of a block, in tokens.

        Returns:
            Echo scores and induction scores, each [num_heads]: means over the tokens of all copies but the first.
        """
        tokens, num_heads, _ = query.shape
        num_queries_per_kv = num_heads // key.shape[1]
        echo = np.zeros(num_heads)
        induction = np.zeros(num_heads)
        for head in range(num_heads):
            keys = key[:, head // num_queries_per_kv].astype(np.float64)
            for i in range(1 + period, tokens):
                # Causal attention of token i, after positions and softmax.
                weights = softmax(query[i, head].astype(np.float64) @ keys[: i + 1].T * scale)
                # The same token in an earlier copy; column 0 is the start token.
                earlier = [j for j in range(1, i) if (i - j) % period == 0]
                echo[head] += sum(weights[j] for j in earlier)
                # The token that followed it.
                induction[head] += sum(weights[j + 1] for j in earlier)
        count = tokens - 1 - period
        return echo / count, induction / count

    @staticmethod
    def windowed_attention(
        query: NDArray, keys: NDArray, values: NDArray, scale: float, dropped: tuple[int, int], compensation: bool
    ) -> Float64:
        """Compute one query token's attention in a non-retrieval head (section 3.3).

        Args:
            query: [num_queries_per_kv, head_size], the query heads of one KV head.
            keys: [context, head_size].
            values: [context, head_size].
            scale: Softmax scale.
            dropped: First and end position of D, the dropped tokens.
            compensation: Whether the compensation token takes part.

        Returns:
            [num_queries_per_kv, head_size] float64.
        """
        begin, end = dropped
        query = query.astype(np.float64)
        # Keep the sinks and the window; D is what lies in between.
        kept_keys = np.delete(keys.astype(np.float64), slice(begin, end), axis=0)
        kept_values = np.delete(values.astype(np.float64), slice(begin, end), axis=0)
        logits = query @ kept_keys.T * scale
        if compensation and end > begin:
            # The compensation token: the mean key and value of D.
            mean_key = keys[begin:end].astype(np.float64).mean(0)
            mean_value = values[begin:end].astype(np.float64).mean(0)
            # Its logit is increased by log(Nd), so that it counts Nd times in numerator and denominator.
            extra = query @ mean_key * scale + np.log(end - begin)
            logits = np.concatenate([logits, extra[:, None]], 1)
            kept_values = np.concatenate([kept_values, mean_value[None]])
        return softmax(logits) @ kept_values


def resolve_retrieval_heads(options: RazorAttentionOptions, engine: Engine) -> list[LayerHead]:
    """Return the retrieval heads: as given, or selected by the scores of a profile.

    Raises:
        ConfigError: The profile cannot be read.
        Unsupported: There is no profile for this model, or it belongs to another one.
    """
    if isinstance(options.keep, tuple):
        first = range(min(options.protect_layers, engine.layers))
        protected = ((layer, head) for layer in first for head in range(engine.kv_heads))
        return list(dict.fromkeys([*((layer, head) for layer, head in options.keep), *protected]))
    setting = profile_option.resolve_profile_option(RazorAttention.name, options.profile, engine, TUNE)
    if setting is None:
        raise Unsupported(
            RazorAttention.name,
            "no profile of its heads is shipped",
            f"run `{TUNE}` for this model, and name the file in profile",
            engine.model,
        )
    shape = (engine.layers, engine.kv_heads)
    try:
        echo, induction = (np.asarray(setting[name], np.float64) for name in ("echo", "induction"))
        if not echo.shape == induction.shape == shape or not np.isfinite(echo + induction).all():
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            f"pilotfish.kv.profile: echo and induction are expected as {shape[0]} lists of {shape[1]} numbers"
        ) from None
    return select_retrieval_heads(echo, induction, options.keep, options.protect_layers)


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(RazorAttention)
