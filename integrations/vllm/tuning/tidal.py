"""`pilotfish tune tidal`: finds the layers of a model that should select tokens, by measurements inside vLLM.

1. One run for each layer in which this layer reads the first and the latest tokens only: layers with next to no
   divergence from full attention become window layers.
2. One pass over a few texts in which every layer selects tokens: for each pair of layers, how much of the attention of
   one layer is missed with the selection of the other.
3. For every number of full-attention layers, the set of other layers that misses least (`kvcache.layer_choice`).
4. Each of these sets is run, and its divergence from full attention and its needle recall are measured.

The ``default`` setting has the fewest full-attention layers whose divergence stays below the target and that find the
needles which full attention finds; ``fast`` has the fewest whose divergence stays below a larger target.
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress, TaskID

from ....kvcache import profiles
from ....kvcache.layer_choice import LayerChoice, best_layer_choices
from ....kvcache.profiles import Profile
from ....plugins.config import ConfigError, build_options
from ....plugins.contracts import Engine
from ....plugins.terminal import make_table, print_plain
from ....plugins.tidal_decode import TidalDecode, TidalDecodeOptions
from ...bench import record
from ..bench import corpora, needle_in_haystack
from ..bench.engine import EngineProcess
from ..bench.kv import WORKER
from ..bench.kv_work import ROOM, TEXTS, max_positions
from ..bench.needle_in_haystack import NeedleQuestion
from ..models import registry
from ..serving.command import check_model
from ..serving.progress import console as status
from ..serving.progress import counting_bar

# Share of the default setting's target that the divergence of all window layers may reach, if they add up.
WINDOW_SHARE = 0.5
LONGEST = 8000  # tokens: layers that suit a long context suit a short one, but not the reverse


@dataclass(frozen=True)
class TidalTuning:
    """Settings of the search; see `pilotfish tune tidal --help`."""

    model: str
    text: Path | None
    budget: int
    context: int  # 0: the model's maximum, at most `LONGEST`
    tokens: int
    max_layers: int
    default_kl: float
    fast_kl: float
    needle_loss: float
    dtype: str
    out: Path


@dataclass(frozen=True)
class LayerTrial:
    """Results of one set of layers: divergence from full attention, and the share of needles found."""

    choice: LayerChoice
    kl: float
    same_top: float
    needles: float


def find_selection_layers(plan: TidalTuning) -> Profile:
    """Find the layers, print the results, and write the profile."""
    check_model(plan.model)
    build_options(TidalDecodeOptions, {"budget": plan.budget}, "pilotfish.kv")
    text = corpora.sample_corpus() if plan.text is None else corpora.read_corpus(plan.text)
    check_profile_path(plan.out)
    folder = registry.resolve_model(plan.model)
    tokenizer = corpora.tokenizer_of(folder)
    room = max(plan.tokens, ROOM) + 1  # positions after a context, for decoded tokens
    limit = max_positions(folder) or LONGEST + room
    plan = replace(plan, context=plan.context or min(LONGEST, limit - room))
    if not 0 < plan.context <= max(limit - room, 0):
        raise ConfigError(f"--context {plan.context}: {plan.model} has {limit} positions, {room} are for decoding")
    cut = corpora.excerpts(tokenizer, text, TEXTS, plan.context + plan.tokens, "--text")
    groups = list(needle_in_haystack.needle_questions(tokenizer, text, plan.context, seed=0))[::2]
    config = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": plan.context + room,
        "max_num_seqs": max(TEXTS, needle_in_haystack.ROUNDS),
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "additional_config": {"pilotfish": {"kv": {"name": TidalDecode.name, "budget": plan.budget}}},
    }
    with tempfile.TemporaryDirectory() as logs, counting_bar() as bar:
        task = bar.add_task("starting the engine", total=3 + len(groups))
        with EngineProcess(config, Path(logs) / "engine.log", worker=WORKER) as engine:
            facts = engine.ask(do="facts")
            full, tried = _try(plan, engine, Engine(**facts), cut, groups, bar, task)
    print_tidal_profile(full, tried)
    profile = to_profile(plan, facts["fingerprint"], full, tried)
    profiles.write_profile(plan.out, profile)
    status.print(f"written to {plan.out}: {', '.join(profile.settings)}", markup=False)
    return profile


def check_profile_path(path: Path) -> None:
    """Refuse a path to which a profile cannot be written, or from which it would not be loaded.

    Raises:
        ConfigError: The path is not that of a ``.json`` file in an existing folder.
    """
    if path.suffix != ".json" or not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: not a .json file in a folder that exists")
    record.check_output_path(path)


def _try(
    plan: TidalTuning,
    engine: Any,
    model: Engine,
    cut: list[list[int]],
    groups: list[list[NeedleQuestion]],
    bar: Progress,
    task: TaskID,
) -> tuple[float, list[LayerTrial]]:
    """Find and run the best set of layers of every size; return the needle recall of full attention, and the trials."""
    ask: dict[str, Any] = {
        "prompts": [ids[: plan.context] for ids in cut],
        "texts": [ids[plan.context :] for ids in cut],
    }
    bar.update(task, description="full attention")
    engine.ask(do="policy", options=None)
    engine.ask(do="forced", **ask, keep=True)

    def divergence(options: dict[str, Any]) -> tuple[float, float]:
        engine.ask(do="policy", options=options)
        answer = engine.ask(do="forced", **ask, keep=False)
        kl, same = (statistics.fmean(x for row in answer[key] for x in row) for key in ("kl", "same"))
        return kl, same

    bar.update(task, description="layers as window layers", advance=1)
    alone = {n: divergence(only_window_layer(n, model.layers, plan.budget))[0] for n in model.attention_layers}
    window = window_layers(alone, plan.default_kl)
    bar.update(task, description="comparing the selections of layers", advance=1)
    rule = vars(TidalDecodeOptions(budget=plan.budget).rule)
    of_text = np.array(engine.ask(do="missed", **ask, rule=rule)["missed"])
    of_needles = np.zeros_like(of_text)
    for group in groups[1::2]:
        contexts, copied = [q.context for q in group], [q.text + q.answer for q in group]
        positions = [q.place for q in group]
        answer = engine.ask(do="missed", prompts=contexts, texts=copied, rule=rule, places=positions)
        of_needles += np.array(answer["missed"])
    bar.update(task, description="running sets of layers", advance=1)
    choices = candidates(of_text, of_needles, plan.max_layers, window)
    settings = [{"budget": plan.budget, **layers_of(c)} for c in choices]
    distances = [divergence(options) for options in settings]
    bar.update(task, description="needle test")
    exact: list[list[bool]] = [[] for _ in range(1 + len(settings))]
    for group in groups:  # all sets on one group, so that its contexts are prefilled once
        for options, results in zip([None, *settings], exact, strict=True):
            engine.ask(do="policy", options=options)
            results += [a.exact for a in needle_in_haystack.answer_questions(engine, group)]
        bar.advance(task)
    full, *recalls = [statistics.fmean(results) for results in exact]
    tried = [LayerTrial(c, kl, same, r) for c, (kl, same), r in zip(choices, distances, recalls, strict=True)]
    return full, tried


def only_window_layer(layer: int, layers: int, budget: int) -> dict[str, Any]:
    """Return options by which one layer is a window layer and the others compute full attention."""
    select, *full = (n for n in range(layers) if n != layer)
    return {"budget": budget, "full_layers": full, "select_layers": [select], "window_layers": [layer]}


def window_layers(alone: dict[int, float], target: float) -> tuple[int, ...]:
    """Return the layers that become window layers; at least three are left to select tokens and to read them.

    Args:
        alone: Divergence from full attention by layer, if it alone is a window layer.
        target: Divergence that the ``default`` setting may have.
    """
    ranked = sorted(alone, key=lambda n: alone[n])[: max(0, len(alone) - 3)]
    return tuple(sorted(n for n in ranked if alone[n] <= WINDOW_SHARE * target / len(alone)))


def layers_of(choice: LayerChoice) -> dict[str, list[int]]:
    """Return the options that choose these layers."""
    layers = {"full_layers": list(choice.full), "select_layers": list(choice.select)}
    return layers | ({"window_layers": list(choice.window)} if choice.window else {})


def candidates(
    of_text: NDArray[np.floating], of_needles: NDArray[np.floating], most: int, window: tuple[int, ...] = ()
) -> list[LayerChoice]:
    """Return sets of layers worth running, smallest first: the best of every size for texts, for needles, for both.

    Args:
        of_text: [layers, layers] attention that the column's layer misses when it reads the selection of the row's
            layer, while a text is decoded.
        of_needles: [layers, layers] the same attention, while needles are retrieved.
        most: Largest number of full-attention layers.
        window: Window layers; the others have another role.

    Returns:
        Different sets; their losses are not comparable with each other.
    """
    others = [n for n in range(len(of_text)) if n not in window]
    of_text, of_needles = (m[np.ix_(others, others)] for m in (of_text, of_needles))
    losses = [m / max(best_layer_choices(m, most=1)[0].loss, 1e-12) for m in (of_text, of_needles)]
    sets: dict[tuple[tuple[int, ...], tuple[int, ...]], LayerChoice] = {}
    for weights in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0)):
        for choice in best_layer_choices(weights[0] * losses[0] + weights[1] * losses[1], most):
            full, select = (tuple(others[n] for n in numbers) for numbers in (choice.full, choice.select))
            sets.setdefault((full, select), LayerChoice(full, select, choice.loss, window))
    return sorted(sets.values(), key=lambda c: c.num_full_layers)


def to_profile(plan: TidalTuning, fingerprint: str, full: float, tried: list[LayerTrial]) -> Profile:
    """Return the profile: each setting has the fewest full-attention layers that meet its targets.

    If no set meets a target, the setting has the least divergence that was measured, and a message says so.

    Args:
        plan: Settings of the search, with the targets.
        fingerprint: Fingerprint of the model.
        full: Share of needles that full attention finds.
        tried: Measured sets of layers.
    """
    tried = sorted(tried, key=lambda t: (t.choice.num_full_layers, t.kl))
    closest = min(tried, key=lambda t: t.kl)
    settings = {}
    for name, target, needles in (
        ("default", plan.default_kl, full - plan.needle_loss),
        ("fast", plan.fast_kl, 0.0),
    ):
        best = next((t for t in tried if t.kl <= target and t.needles >= needles), None)
        if best is None:
            status.print(
                f"{name}: no set of layers stays below {target} and finds the needles; the least is {closest.kl:.3f}",
                markup=False,
            )
        choice = (best or closest).choice
        settings[name] = layers_of(choice)
    return Profile(
        policy=TidalDecode.name,
        model=plan.model,
        fingerprint=fingerprint,
        settings=settings,
        evidence={
            "text": "the reference pages of Python's help()" if plan.text is None else plan.text.name,
            "budget": plan.budget,
            "context": plan.context,
            "tokens": plan.tokens * TEXTS,
            "dtype": plan.dtype,
            "needles_full_attention": full,
            "curve": [
                {
                    **layers_of(t.choice),
                    "kl": round(t.kl, 5),
                    "same_top": round(t.same_top, 4),
                    "needles": t.needles,
                }
                for t in tried
            ],
        },
    )


def print_tidal_profile(full: float, tried: list[LayerTrial]) -> None:
    """Print the measured sets of layers as a table."""
    numbers = ("layers", "KL", "same top token", "needle recall")
    names = ("layers", "full attention", "token selection", "window", *numbers[1:])
    table = make_table(*names, numbers=numbers)
    table.title = "Sets of full-attention layers"
    table.add_row("all", "all", "", "", "0", "", f"{full:.0%}")
    for t in tried:
        choice = t.choice
        layers = [" ".join(map(str, layers)) for layers in (choice.full, choice.select, choice.window)]
        row = (str(choice.num_full_layers), *layers, f"{t.kl:.4f}", f"{t.same_top:.1%}", f"{t.needles:.0%}")
        table.add_row(*row)
    print_plain(table)
