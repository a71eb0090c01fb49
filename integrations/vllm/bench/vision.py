"""Visual pruners beside stock: tokens, blocks, time of the language model, of the tower and to the first token."""

import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError, Selection, parse_assignments
from ....plugins.manager import plugins
from ...bench import record
from ...bench.record import Record
from ..models import registry
from ..serving.progress import counting_bar
from . import vision_quality
from .engine import EngineProcess

WORKER = ("-m", "pilotfish.integrations.vllm.bench.vision_worker")
STOCK = "stock"
PROMPT = "Describe the picture in one sentence."
TWICE = ("language_cpu_s", "language_s", "tower_s", "selection_s", "ttft_s", "total_s")  # of which medians are taken
COUNTS = ("prompt_tokens", "kv_blocks", "gflops")


@dataclass(frozen=True)
class VisionBenchmark:
    """What to measure.

    Attributes:
        pictures: For requests; the first alone, the first two together, four requests with one each.
        quality: Folders of pictures in which a needle is hidden; none: ().
        model: A LLaVA checkpoint, or the name of an embedded model.
        arms: Pruners, NAME[,key=value...].
        repeats: How often each is run.
        out: Where the JSON goes.
    """

    pictures: tuple[Path, ...]
    quality: tuple[Path, ...]
    model: str
    arms: tuple[str, ...]
    repeats: int
    out: Path


def run_vision_benchmark(plan: VisionBenchmark) -> None:
    """Measure, and write the JSON.

    Raises:
        ConfigError: a picture, an arm or the place of the JSON cannot be used.
    """
    record.check_output_path(plan.out)
    if len(plan.pictures) < 4:
        raise ConfigError("--image: name four or more")
    for path in (*plan.pictures, *plan.quality):
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
    chosen = {_label(s): s for s in map(parse_assignments, plan.arms)}
    for selection in chosen.values():
        plugins().resolve("pruner", selection)
    asked = {label: {"name": s.name, **s.options} for label, s in chosen.items()}
    folder = registry.resolve_model(plan.model)
    records = _engines(plan, folder, asked) if plan.repeats else []
    if plan.quality:
        records += vision_quality.measure_retention(Path(folder), plan.quality)
    record.write_records(plan.out, records)


def _label(selection: Selection) -> str:
    options = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in selection.options.items())
    return "@".join([selection.name, *options])


def _cases(pictures: tuple[Path, ...]) -> dict[str, list[dict[str, Any]]]:
    one = [{"prompt": f"<image>\n{PROMPT}", "pictures": [str(p)]} for p in pictures[:4]]
    two = {"prompt": f"<image> and <image>\n{PROMPT}", "pictures": [str(p) for p in pictures[:2]]}
    return {"single": one[:1], "two_pictures": [two], "batch_4": one}


def _engines(plan: VisionBenchmark, folder: str, asked: dict[str, Any]) -> list[Record]:
    """Arms in turns: those that leave the language model alone in one engine, each other in its own."""
    inside = {label: s for label, s in asked.items() if "experimental_layers" in s}
    cases, found = _cases(plan.pictures), {}
    config = {
        "model": folder,
        "dtype": "float32",
        "max_model_len": 8192,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
    }
    number = 0
    with ExitStack() as stack, counting_bar() as bar:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def begin(pruner: dict[str, Any]) -> EngineProcess:
            key = {"additional_config": {"pilotfish": {"pruner": pruner}}}
            return stack.enter_context(EngineProcess({**config, **key}, logs / "engine.log", worker=WORKER))

        whole = begin({"name": "globalcom2", "retain": 1.0})
        task = bar.add_task("pictures", total=(plan.repeats + 1) * len(cases) * (1 + len(asked)))
        arms: list[tuple[str, Any, Any]] = [(STOCK, whole, None)]
        arms += [(label, whole, s) for label, s in asked.items() if label not in inside]
        for label, selection in inside.items():
            arms.append((label, begin(selection), None))
        for repeat in range(plan.repeats + 1):
            for case, requests in cases.items():
                for label, engine, selection in arms:
                    number += 1
                    answer = engine.ask(do="look", requests=requests, pruner=selection, run=number)
                    if repeat:  # the first is for warming up
                        found.setdefault((case, label), []).append(answer)
                    bar.advance(task)
    return [r for (case, label), runs in found.items() for r in _records(case, label, runs, found[case, STOCK])]


def _records(case: str, label: str, runs: list[dict[str, float]], stock: list[dict[str, float]]) -> list[Record]:
    made = []
    for metric in TWICE:
        values = [r.get(metric, 0.0) for r in runs]
        made.append(Record("vision", case, label, metric, round(statistics.median(values), 5), "s", values))
        base = [r.get(metric, 0.0) for r in stock]
        if label != STOCK and metric in ("language_cpu_s", "ttft_s"):
            name = {"language_cpu_s": "prefill_speedup", "ttft_s": "ttft_speedup"}[metric]
            ratios = [b / v for b, v in zip(base, values, strict=True)]
            made.append(Record("vision", case, label, name, round(statistics.median(ratios), 3), "x", ratios))
    for metric in COUNTS:
        made.append(Record("vision", case, label, metric, round(runs[0][metric], 2), "", []))
    return made
