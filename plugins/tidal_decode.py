"""TidalDecode: position-persistent sparse attention for decoding (arXiv 2410.05076).

Neighbouring layers of a model attend to nearly the same tokens (section 3.2). So a few layers compute full attention
and select the top-k tokens, and the layers after each of them attend to these tokens only (section 3.3, algorithm 1):

    full layers             full attention
    select_layers[0]        token selection layer: full attention; selects the k tokens of highest attention
    layers in between       sparse attention over the selected tokens
    select_layers[1]        token re-selection layer: full attention; selects again
    ...
    window_layers           sparse attention over the first and the latest tokens
    prefill                 full attention in every layer
    KV correction           every T decoded tokens, recompute their keys and values with full attention (section 3.4)

Not in the paper, each measured in ``docs/tidal_decode.md``: heads share one selection, ranked by the largest attention
weight of any head, so that a token which matters to a single head is kept; sinks and recent tokens are always kept;
whole pages of 32 tokens are selected, which reads memory in the order of its layout; window layers: some layers of a
model attend to little else than the first and the latest tokens, as in StreamingLLM (arXiv 2309.17453), so that they
need neither full attention nor the selection of another layer; selection layers may attend to the tokens that they
select, and then read the keys of all tokens but few values; selection in two passes (``select=two_pass``):

    candidates              pages of the largest bounds of their attention, as in Quest (arXiv 2406.10774)
    selection               tokens of the highest attention among the candidates, as if there were no others

The static methods of `TidalDecode` are the float64 reference of the kernels in ``kvcache/kernels/paged_decode.cpp`` and
``kvcache/kernels/programs_triton.py``, which compute the same over vLLM's paged KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kvcache.reference import Float64, attention, softmax
from ..kvcache.selection import (
    PAGE_SIZE,
    Granularity,
    HeadAggregation,
    ReadPlan,
    Role,
    SelectionRule,
    unit_positions,
)
from . import compiler_check, profile_option
from .config import ConfigError
from .contracts import Engine, KVPolicy, Unsupported
from .hookspecs import Register, hookimpl
from .quest import Quest


@dataclass(frozen=True)
class TidalDecodeOptions:
    """Options of TidalDecode.

    Attributes:
        budget: Number of tokens that sparse layers read (k in the paper). Requests with a shorter context are served by
            stock attention.
        profile: Source of the layers where ``select_layers`` is not given: the ``NAME`` of a setting in
            the profile shipped for the model (``default``, ``fast``), or ``FILE.json`` or ``FILE.json#NAME`` from
            `pilotfish tune tidal`.
        full_layers: Layers that always compute full attention.
        select_layers: Token selection layers: they compute full attention and select tokens for the layers after them.
        window_layers: Layers that read the first tokens and the latest ones, in whole pages, instead of selected ones.
        window: Number of tokens that window layers read; the budget if not given.
        select: Select among all tokens (``exact``), or in two passes (``two_pass``), which computes the weights of few
            tokens and keeps bounds of each page's keys, in 1/32 of the memory of a selection layer's KV cache.
        candidates: Number of tokens, in whole pages, from which ``two_pass`` selects; four times the budget if not
            given.
        select_attention: Selection layers attend to all tokens (``full``, as in the paper), or to those that they
            select (``selected``).
        head_aggregation: Which heads share a selection, and how their attention is combined; see
            `kvcache.selection.SelectionRule`.
        granularity: Select single tokens (``token``, as in the paper) or pages of 32 tokens (``page``).
        sinks: Number of first tokens that are always kept.
        recent: Number of latest tokens that are always kept; an eighth of the budget if not given.
        correction_interval: Number of decoded tokens (T in the paper) after which their keys and values are recomputed
            with full attention; 0 for never.
    """

    budget: int = 512
    profile: str | None = None
    full_layers: tuple[int, ...] | None = None
    select_layers: tuple[int, ...] | None = None
    window_layers: tuple[int, ...] | None = None
    window: int | None = None
    select: Literal["exact", "two_pass"] = "exact"
    candidates: int | None = None
    select_attention: Literal["full", "selected"] = "full"
    head_aggregation: HeadAggregation = "max"
    granularity: Granularity = "page"
    sinks: int = 4
    recent: int | None = None
    correction_interval: int = 0

    def __post_init__(self) -> None:
        lows = {"budget": 1, "window": 1, "candidates": 1, "sinks": 0, "recent": 0, "correction_interval": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= 1 << 24:
                raise ValueError(f"{name}: expected {low} to {1 << 24}, got {value}")
        for name in ("full_layers", "select_layers", "window_layers"):
            layers = getattr(self, name) or ()
            if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise ValueError(f"{name}: expected layer numbers in ascending order, got {list(layers)}")
        if self.select_layers is not None and not self.select_layers:
            raise ValueError("select_layers: expected at least one layer")
        for name in ("full_layers", "window_layers"):
            if self.select_layers is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: given without select_layers")
        for layer in self.window_layers or ():
            if layer in (*(self.full_layers or ()), *(self.select_layers or ())):
                raise ValueError(f"window_layers: layer {layer} is in full_layers or select_layers too")
        if self.select_layers is not None and self.profile is not None:
            raise ValueError("profile: given together with select_layers; leave one out")
        if self.granularity == "page" and self.budget % PAGE_SIZE:
            raise ValueError(f"budget: expected a multiple of {PAGE_SIZE} with granularity 'page', got {self.budget}")
        if self.budget < (least := self.rule.min_budget):
            raise ValueError(
                f"budget: expected at least {least} to hold {self.sinks} sinks, {self.rule.recent} recent tokens "
                f"and one selected token or page, got {self.budget}"
            )
        for name in ("window", "candidates"):
            if (value := getattr(self, name)) is not None and value % PAGE_SIZE:
                raise ValueError(f"{name}: expected a multiple of {PAGE_SIZE}, got {value}")
        if self.window is not None and self.select_layers is not None and not self.window_layers:
            raise ValueError("window: given without window_layers")
        if self.window_layers and (read := self.rule.window).budget < read.min_budget:
            name = "budget" if self.window is None else "window"
            raise ValueError(f"{name}: expected at least {read.min_budget} with window_layers, got {read.budget}")
        if self.candidates is not None and self.select != "two_pass":
            raise ValueError("candidates: given without select=two_pass")
        if self.window is not None and self.window > self.budget:
            raise ValueError(f"window: expected at most the budget, {self.budget}, got {self.window}")
        if self.candidates is not None and self.candidates < (least := self._least_candidates):
            raise ValueError(f"candidates: expected at least {least}, got {self.candidates}")

    @property
    def _num_recent(self) -> int:
        return self.budget // 8 if self.recent is None else self.recent

    @property
    def _least_candidates(self) -> int:
        """Candidates that hold the sinks, the recent tokens and more than the budget."""
        pages = SelectionRule(0, self.sinks, self._num_recent, "max", "page").min_budget
        return max(pages, PAGE_SIZE * (-(-self.budget // PAGE_SIZE) + 1))

    @property
    def rule(self) -> SelectionRule:
        """The selection rule that these options describe."""
        candidates = self.candidates or max(-(-4 * self.budget // PAGE_SIZE) * PAGE_SIZE, self._least_candidates)
        return SelectionRule(
            self.budget,
            self.sinks,
            self._num_recent,
            self.head_aggregation,
            self.granularity,
            candidates=candidates if self.select == "two_pass" else 0,
            window_size=self.window or 0,
        )


class TidalDecode(KVPolicy):
    """Sparse attention: few layers select tokens for all.

    The policy gives every layer its role in a decode step.
    """

    name: ClassVar[str] = "tidal_decode"
    Options: ClassVar[type] = TidalDecodeOptions

    @classmethod
    def check(cls, options: TidalDecodeOptions, engine: Engine) -> None:
        """Refuse layers or a profile of another model, and a machine that cannot compile the kernels."""
        attending = engine.attention_layers
        if engine.layers and not attending:
            raise Unsupported(
                cls.name, "no layer of the model attends to all tokens", "run without the policy", engine.model
            )
        full, select, window = resolve_layers(options, engine)
        for name, layers in (("full_layers", full), ("select_layers", select), ("window_layers", window)):
            for layer in layers if engine.layers else ():
                if layer >= engine.layers:
                    reason, remedy = f"the model has layers 0 to {engine.layers - 1}", f"choose {name} for this model"
                elif layer not in attending:
                    reason = "it does not attend to all tokens (sliding window, linear attention or a recurrent state)"
                    remedy = f"choose {name} among {', '.join(map(str, attending))}"
                else:
                    continue
                raise Unsupported(cls.name, f"{name} names it, but {reason}", remedy, engine.model, str(layer))
        sparse = [layer for layer in attending if layer > select[0] and layer not in {*full, *select, *window}]
        if engine.layers and not sparse and options.select_attention == "full":
            number = f"{len(attending)} of {engine.layers} layers attend to all tokens"
            raise Unsupported(
                cls.name,
                f"no layer would attend to the selected tokens: {number}, all of them full, selection or window layers",
                "choose other select_layers, or run without the policy",
                engine.model,
            )
        compiler_check.require_compiler(cls.name, engine)

    def __init__(self, options: TidalDecodeOptions, engine: Engine) -> None:
        self.options = options
        self.engine = engine

    def read_plan(self) -> ReadPlan:
        """Return the role of every layer, in the order of the model."""
        layers = resolve_layers(self.options, self.engine)
        role_of = {n: role for role, ns in zip((Role.FULL, Role.SELECT, Role.WINDOW), layers, strict=True) for n in ns}
        roles = tuple(role_of.get(layer, Role.SPARSE) for layer in range(self.engine.layers))
        full_selection = self.options.select_attention == "full"
        return ReadPlan(roles, self.options.rule, self.options.correction_interval, full_selection)

    # ---------------------------------------------------------------------------------- the algorithm, in NumPy

    def decode_step(
        self, queries: Sequence[NDArray], keys: Sequence[NDArray], values: Sequence[NDArray], scale: float
    ) -> list[Float64]:
        """Compute the attention of one decode step of one request, layer by layer (algorithm 1).

        Args:
            queries: For each layer [num_heads, head_size].
            keys: For each layer [context, num_kv_heads, head_size], the current token last.
            values: As ``keys``.
            scale: Softmax scale.

        Returns:
            For each layer the attention output, [num_heads, head_size].
        """
        plan = self.read_plan()
        outputs = []
        selected = None
        for layer, role in enumerate(plan.roles):
            # Sparse layer: attend to the tokens that the last selection layer selected.
            if role is Role.SPARSE and selected is not None:
                outputs.append(self.sparse_attention(queries[layer], keys[layer], values[layer], scale, selected))
                continue
            # Window layer: attend to the first and the latest tokens.
            if role is Role.WINDOW and len(keys[layer]) > plan.rule.budget:
                pages = np.arange(-(-len(keys[layer]) // PAGE_SIZE))
                window = self.select_tokens(np.repeat(pages, PAGE_SIZE)[: len(keys[layer])], plan.rule.window)
                outputs.append(self.sparse_attention(queries[layer], keys[layer], values[layer], scale, [window]))
                continue
            # Full-attention layer.
            logits, output = attention(queries[layer], keys[layer], values[layer], scale)
            outputs.append(output)
            # Token selection or re-selection layer: select the top-k tokens for the layers that follow.
            if role is Role.SELECT and logits.shape[1] > plan.rule.budget:
                if plan.rule.candidates:
                    selected = self.select_in_two_passes(queries[layer], keys[layer], logits, scale, plan.rule)
                else:
                    scores = self.token_scores(logits, plan.rule, keys[layer].shape[1])
                    selected = [self.select_tokens(group, plan.rule) for group in scores]
                if not plan.full_selection:
                    outputs[-1] = self.sparse_attention(queries[layer], keys[layer], values[layer], scale, selected)
        return outputs

    @staticmethod
    def token_scores(logits: NDArray, rule: SelectionRule, num_kv_heads: int) -> Float64:
        """Return how much each token matters to each group of heads that shares a selection.

        Args:
            logits: [num_heads, context] scaled query-key products of one request.
            rule: The selection rule.
            num_kv_heads: Number of KV heads.

        Returns:
            [num_head_groups, context] float64.
        """
        weights = softmax(logits)
        num_heads = len(logits)
        if rule.head_aggregation == "head":
            return weights
        if rule.head_aggregation == "kv_head":
            return weights.reshape(num_kv_heads, num_heads // num_kv_heads, -1).sum(1)
        if rule.head_aggregation == "max":
            return weights.max(0, keepdims=True)
        if rule.head_aggregation == "union":
            # Every head proposes its best tokens; tokens that no head proposes count nothing.
            num_proposals = min(rule.budget - rule.recent, logits.shape[1])
            threshold = np.sort(weights, 1)[:, -num_proposals][:, None]
            weights = np.where(weights >= threshold, weights, 0)
        return weights.sum(0, keepdims=True)

    @staticmethod
    def select_tokens(scores: NDArray, rule: SelectionRule) -> list[int]:
        """Select the top-k tokens of one group of heads; the earlier of two equal ones.

        Args:
            scores: [context] result of `token_scores`.
            rule: The selection rule.

        Returns:
            The positions of the selected tokens, ascending.
        """
        context = len(scores)
        unit = PAGE_SIZE if rule.granularity == "page" else 1
        num_units = -(-context // unit)
        unit_scores = [scores[u * unit : (u + 1) * unit].sum(dtype=np.float32) for u in range(num_units)]
        # Sinks, recent tokens and the current token are always kept.
        last_not_recent = context - 1 - rule.recent
        kept = {u for u in range(num_units) if u * unit < rule.sinks or (u + 1) * unit > last_not_recent}
        # The rest of the budget goes to the tokens (or pages) of highest score.
        others = sorted((u for u in range(num_units) if u not in kept), key=lambda u: (-unit_scores[u], u))
        kept |= set(others[: max(0, rule.budget // unit - len(kept))])
        return unit_positions(sorted(kept), context, rule)

    @staticmethod
    def select_in_two_passes(
        query: NDArray, keys: NDArray, logits: NDArray, scale: float, rule: SelectionRule
    ) -> list[list[int]]:
        """Select the top-k tokens among the pages with the largest bounds of their attention.

        Args:
            query: [num_heads, head_size].
            keys: [context, num_kv_heads, head_size].
            logits: [num_heads, context] scaled query-key products, of which those of the candidates are used.
            scale: Softmax scale.
            rule: The selection rule, with a number of candidates.

        Returns:
            For each group of heads the positions of the selected tokens, ascending.
        """
        bounds = Quest.bound_logits(query, Quest.page_bounds(keys), scale)
        pages = TidalDecode.token_scores(bounds, rule.candidate_rule, keys.shape[1])[0]
        candidates = TidalDecode.select_tokens(np.repeat(pages, PAGE_SIZE)[: len(keys)], rule.candidate_rule)
        scores = TidalDecode.token_scores(logits[:, candidates], rule, keys.shape[1])
        return [[candidates[i] for i in TidalDecode.select_tokens(group, rule)] for group in scores]

    @staticmethod
    def sparse_attention(
        query: NDArray, keys: NDArray, values: NDArray, scale: float, selected: Sequence[Sequence[int]]
    ) -> Float64:
        """Compute attention over selected tokens.

        Args:
            query: [num_heads, head_size].
            keys: [context, num_kv_heads, head_size].
            values: As ``keys``.
            scale: Softmax scale.
            selected: For each group of heads the positions it reads; the heads are divided evenly among the groups.

        Returns:
            [num_heads, head_size] float64.
        """
        num_heads = len(query)
        num_queries_per_kv = num_heads // keys.shape[1]
        output = np.empty(query.shape, np.float64)
        for head in range(num_heads):
            positions = list(selected[head * len(selected) // num_heads])
            kv_head = slice(head // num_queries_per_kv, head // num_queries_per_kv + 1)
            _, result = attention(query[head : head + 1], keys[positions, kv_head], values[positions, kv_head], scale)
            output[head] = result[0]
        return output


class Layers(NamedTuple):
    """Layers of a model by their role, as in `TidalDecodeOptions`; the others are sparse."""

    full: tuple[int, ...]
    select: tuple[int, ...]
    window: tuple[int, ...] = ()


def resolve_layers(options: TidalDecodeOptions, engine: Engine) -> Layers:
    """Return the layers with a role: as given, from a profile, or evenly spaced.

    Raises:
        ConfigError: The profile cannot be read, or has no such setting.
        Unsupported: The profile belongs to another model.
    """
    if options.select_layers is not None:
        return Layers(options.full_layers or (), options.select_layers, options.window_layers or ())
    setting = profile_option.resolve_profile_option(TidalDecode.name, options.profile, engine, "pilotfish tune tidal")
    if setting is None:
        if options.window is not None:
            raise ConfigError("pilotfish.kv.window: no layer is a window layer; set select_layers and window_layers")
        return evenly_spaced_layers(engine.attention_layers)
    names = ("full_layers", "select_layers", "window_layers")
    found = [setting.get(name, []) for name in names]
    for name, layers in zip(names, found, strict=True):
        if not isinstance(layers, list) or not all(isinstance(n, int) and n >= 0 for n in layers):
            raise ConfigError(f"pilotfish.kv.profile: {name}: expected a list of layer numbers")
    full, select, window = map(tuple, found)
    try:  # the layers of a profile have to fit the other options as given ones do
        replace(options, profile=None, full_layers=full, select_layers=select, window_layers=window)
    except ValueError as error:
        raise ConfigError(f"pilotfish.kv.profile: {error}") from None
    return Layers(full, select, window)


def evenly_spaced_layers(layers: Sequence[int], selections: int = 4) -> Layers:
    """Return the layers with a role for a model that was not tuned.

    The first two layers compute full attention; at most ``selections`` selection layers follow at equal distances.

    Args:
        layers: Layers of the model that attend to all tokens, ascending.
        selections: Largest number of selection layers.
    """
    first = min(2, max(len(layers) - 2, 0))
    step = max(2, -(-(len(layers) - first) // selections))  # at least one sparse layer after each selection layer
    return Layers(tuple(layers[:first]), tuple(layers[first::step]) or (0,))


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(TidalDecode)
