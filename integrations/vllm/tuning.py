"""`pilotfish tune tidal`: which layers of a model should choose positions, found on the model itself, inside vLLM.

1. One pass over a few texts with every layer choosing: for each pair of layers, how much of the attention of the one
   is covered by the choice of the other.
2. For every number of layers that read everything, the set that misses least (`kvcache.layer_choice`).
3. Each of these is run, and its divergence from full attention measured.

The ``default`` setting is the one with the fewest reading layers whose divergence stays below the target, ``fast`` the
one with the fewest that stays below the larger of two targets.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...kvcache import profiles
from ...kvcache.layer_choice import LayerChoice, best_choices
from ...kvcache.profiles import Profile
from ...plugins.config import ConfigError, build_options
from ...plugins.tidal_decode import TidalDecode, TidalDecodeOptions
from . import models
from .bench.engine import EngineProcess
from .bench.kv import TEXTS, WORKER, read_text
from .progress import console as status
from .progress import counting_bar
from .serving import check_model


@dataclass(frozen=True)
class Plan:
    """What to tune; see `pilotfish tune tidal --help`."""

    model: str
    text: Path | None
    budget: int
    context: int
    tokens: int
    most: int
    default_kl: float
    fast_kl: float
    dtype: str
    out: Path


@dataclass(frozen=True)
class Tried:
    """A set of layers, and how far it is from full attention."""

    choice: LayerChoice
    kl: float
    same_top: float


def sample_text() -> str:
    """English prose that every Python brings: the reference pages that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def run(plan: Plan) -> Profile:
    """Tune, show the figures, write the profile."""
    check_model(plan.model)
    build_options(TidalDecodeOptions, {"budget": plan.budget}, "pilotfish.kv")
    text = sample_text() if plan.text is None else read_text(plan.text)
    if plan.out.is_dir() or not plan.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {plan.out}: not a file in a folder that exists")
    folder = models.resolve(plan.model)
    prompts, texts = _cut(folder, text, plan)
    config = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": plan.context + plan.tokens + 1,
        "max_num_seqs": TEXTS,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "additional_config": {"pilotfish": {"kv": {"name": TidalDecode.name, "budget": plan.budget}}},
    }
    with tempfile.TemporaryDirectory() as logs, counting_bar() as bar:
        task = bar.add_task("starting the engine", total=2 + plan.most)
        with EngineProcess(config, Path(logs) / "engine.log", worker=WORKER) as engine:
            ask: dict[str, Any] = {"prompts": prompts, "texts": texts}
            bar.update(task, description="full attention")
            engine.ask(do="policy", options=None)
            engine.ask(do="forced", **ask, keep=True)
            bar.update(task, description="what layers look at", advance=1)
            rule = TidalDecodeOptions(budget=plan.budget).rule
            mass = np.array(engine.ask(do="mass", **ask, rule=vars(rule))["mass"])
            bar.update(task, description="trying sets of layers", advance=1)
            tried = []
            for choice in best_choices(mass, most=plan.most):
                options = {"budget": plan.budget, "full_layers": choice.full, "select_layers": choice.select}
                engine.ask(do="policy", options=options)
                answer = engine.ask(do="forced", **ask, keep=False)
                kl = statistics.fmean(x for row in answer["kl"] for x in row)
                same = statistics.fmean(x for row in answer["same"] for x in row)
                tried.append(Tried(choice, kl, same))
                bar.advance(task)
            fingerprint = engine.ask(do="facts")["fingerprint"]
    show(tried)
    profile = to_profile(plan, fingerprint, tried)
    profiles.write(plan.out, profile)
    status.print(f"written to {plan.out}: {', '.join(profile.settings)}", markup=False)
    return profile


def to_profile(plan: Plan, fingerprint: str, tried: list[Tried]) -> Profile:
    """The profile: each setting takes the fewest reading layers whose divergence stays below its target.

    A target that nothing meets takes the least divergence that was found, and says so.
    """
    closest = min(tried, key=lambda t: t.kl)
    settings = {}
    for name, target in (("default", plan.default_kl), ("fast", plan.fast_kl)):
        found = next((t for t in tried if t.kl <= target), None)
        if found is None:
            status.print(f"no set of layers stays below {target} ({name}): {closest.kl:.3f} is the least", markup=False)
        chosen = (found or closest).choice
        settings[name] = {"full_layers": list(chosen.full), "select_layers": list(chosen.select)}
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
            "curve": [
                {
                    "full_layers": list(t.choice.full),
                    "select_layers": list(t.choice.select),
                    "attention_missed": round(t.choice.loss, 4),
                    "kl": round(t.kl, 5),
                    "same_top": round(t.same_top, 4),
                }
                for t in tried
            ],
        },
    )


def _cut(folder: str, text: str, plan: Plan) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts at even distances in the text, and what follows each."""
    from transformers import AutoTokenizer

    need = plan.context + plan.tokens
    ids = AutoTokenizer.from_pretrained(folder)(text[: 40 * need], add_special_tokens=False)["input_ids"]
    if len(ids) < need + TEXTS:
        raise ConfigError(f"--text: {len(ids)} tokens, at least {need + TEXTS} are needed")
    stride = (len(ids) - need) // TEXTS
    starts = [i * stride for i in range(TEXTS)]
    return [ids[s : s + plan.context] for s in starts], [ids[s + plan.context : s + need] for s in starts]


def show(tried: list[Tried]) -> None:
    """What was tried, as a table."""
    from rich.table import Table

    table = Table("layers that read everything", "full", "selecting", "attention missed", "KL", "same top token")
    for t in tried:
        full, select = (" ".join(map(str, layers)) for layers in (t.choice.full, t.choice.select))
        missed = f"{t.choice.loss:.2f}"
        table.add_row(str(t.choice.reading), full, select, missed, f"{t.kl:.4f}", f"{t.same_top:.1%}")
    Console().print(table)
