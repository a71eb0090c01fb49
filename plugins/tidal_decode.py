"""TidalDecode (arXiv 2410.05076): position-persistent sparse attention for decoding.

Neighbouring layers of a model look at nearly the same positions. A few layers attend to everything and choose
positions; all others attend to those only.

    full_layers          full attention
    select_layers[0]     full attention; the positions that matter are chosen
    layers in between    attention over the chosen positions
    select_layers[1]     full attention; positions are chosen anew
    ...
    prefill              full attention everywhere
    correction           every T decoded tokens, their keys and values are computed anew with full attention

Beyond the paper, each measured (`docs/tidal_decode.md`): heads share one choice by the most that any of them attends,
so that what a single head looks for is kept; recent positions and sinks are always kept; whole pages are chosen, which
reads memory in the order it lies in.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, ReadPlan, Role, SelectionRule
from . import compiler_check, profile_option
from .config import ConfigError
from .contracts import Engine, KVPolicy, Unsupported
from .hookspecs import Register, hookimpl


@dataclass(frozen=True)
class TidalDecodeOptions:
    """Options of TidalDecode.

    Attributes:
        budget: Positions that sparse layers read; a context within it is left to stock attention.
        profile: Where the layers below come from when they are not given: ``NAME``, a setting of the profile that is
            shipped for the model (``default``, ``fast``), or ``FILE.json`` or ``FILE.json#NAME``, from
            `pilotfish tune tidal`.
        full_layers: Layers that always attend to everything.
        select_layers: Layers that attend to everything and choose positions for those after them.
        head_aggregation: Who shares a choice, see `kvcache.selection.Rule`.
        granularity: Choose single positions (``token``, the paper) or pages of 32 (``page``).
        sinks: First positions, always kept.
        recent: Latest positions, always kept; an eighth of the budget if not given.
        correction_interval: Decoded tokens after which their keys and values are computed anew with full attention;
            0 for never.
    """

    budget: int = 512
    profile: str | None = None
    full_layers: tuple[int, ...] | None = None
    select_layers: tuple[int, ...] | None = None
    head_aggregation: HeadAggregation = "max"
    granularity: Granularity = "page"
    sinks: int = 4
    recent: int | None = None
    correction_interval: int = 0

    def __post_init__(self) -> None:
        for name, low in (("budget", 1), ("sinks", 0), ("recent", 0), ("correction_interval", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value <= 1 << 24:
                raise ValueError(f"{name}: expected {low} to {1 << 24}, got {value}")
        for name in ("full_layers", "select_layers"):
            layers = getattr(self, name) or ()
            if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise ValueError(f"{name}: expected layer numbers in ascending order, got {list(layers)}")
        if self.select_layers is not None and not self.select_layers:
            raise ValueError("select_layers: at least one layer has to choose positions")
        if self.select_layers is None and self.full_layers is not None:
            raise ValueError("full_layers: given without select_layers")
        if self.select_layers is not None and self.profile is not None:
            raise ValueError("profile: given beside select_layers; leave one out")
        if self.granularity == "page" and self.budget % PAGE_SIZE:
            raise ValueError(f"budget: expected a multiple of {PAGE_SIZE} with granularity 'page', got {self.budget}")
        if self.budget < (least := self.rule.min_budget):
            raise ValueError(
                f"budget: expected at least {least} to hold {self.sinks} sinks, {self.rule.recent} recent positions "
                f"and a choice, got {self.budget}"
            )

    @property
    def rule(self) -> SelectionRule:
        """How positions are chosen."""
        recent = self.budget // 8 if self.recent is None else self.recent
        return SelectionRule(self.budget, self.sinks, recent, self.head_aggregation, self.granularity)


class TidalDecode(KVPolicy):
    """The policy: which layers look at everything, and what the others see."""

    name: ClassVar[str] = "tidal_decode"
    Options: ClassVar[type] = TidalDecodeOptions

    @classmethod
    def check(cls, options: TidalDecodeOptions, engine: Engine) -> None:
        """Refuse a profile or layers of another model, and a machine that cannot compile the kernels."""
        for name, layers in zip(("full_layers", "select_layers"), resolve_layers(options, engine), strict=True):
            for layer in layers:
                if engine.layers and layer >= engine.layers:
                    raise Unsupported(
                        cls.name,
                        f"{name} names it, but the model has layers 0 to {engine.layers - 1}",
                        f"choose {name} for this model",
                        engine.model,
                        str(layer),
                    )
        compiler_check.require_compiler(cls.name, engine)

    def __init__(self, options: TidalDecodeOptions, engine: Engine) -> None:
        self.options, self.engine = options, engine

    def read_plan(self) -> ReadPlan:
        """Full, selecting and sparse layers, in the order of the model."""
        full, select = map(set, resolve_layers(self.options, self.engine))
        roles = tuple(
            Role.SELECT if layer in select else Role.FULL if layer in full else Role.SPARSE
            for layer in range(self.engine.layers)
        )
        return ReadPlan(roles, self.options.rule, self.options.correction_interval)


def resolve_layers(options: TidalDecodeOptions, engine: Engine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers that read everything, and of these the ones that choose: given, from a profile, or spread evenly.

    Raises:
        ConfigError: the profile cannot be read, or has no such setting.
        Unsupported: the profile is of another model.
    """
    if options.select_layers is not None:
        return options.full_layers or (), options.select_layers
    found = profile_option.resolve_profile_option(TidalDecode.name, options.profile, engine, "pilotfish tune tidal")
    if found is None:
        return evenly_spaced_layers(engine.layers)
    full, select = (found.get(name, ()) for name in ("full_layers", "select_layers"))
    for layers in (full, select):
        if not isinstance(layers, list) or not all(isinstance(n, int) and n >= 0 for n in layers):
            raise ConfigError("pilotfish.kv.profile: full_layers and select_layers are expected as lists of numbers")
    if not select:
        raise ConfigError("pilotfish.kv.profile: select_layers is empty, so that nothing would be chosen")
    return tuple(full), tuple(select)


def evenly_spaced_layers(layers: int, choices: int = 4) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For models that were not tuned: two full layers, and ``choices`` selections at even distances behind them."""
    first = min(2, max(layers - 1, 0))
    step = max(1, -(-(layers - first) // choices))
    return tuple(range(first)), tuple(range(first, layers, step)) or (0,)


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(TidalDecode)
