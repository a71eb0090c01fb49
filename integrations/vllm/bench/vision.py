"""Benchmark of visual pruners against stock vLLM: tokens, KV blocks, time of each part of the model, and TTFT."""

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
from .engine import EngineProcess, share_gpu

WORKER = ("-m", "pilotfish.integrations.vllm.bench.vision_worker")
STOCK = "stock"
PROMPT = "Describe the picture in one sentence."
TWICE = ("language_cpu_s", "language_s", "tower_s", "selection_s", "ttft_s", "total_s")  # metrics reported as medians
COUNTS = ("prompt_tokens", "kv_blocks", "gflops")


@dataclass(frozen=True)
class VisionBenchmark:
    """Settings of the benchmark.

    Attributes:
        images: Images of the requests: the first one alone, the first two in one prompt, and four requests with one
            image each.
        quality: Folders of images in which a needle is hidden; () to skip this part.
        model: LLaVA checkpoint, or name of an embedded model.
        arms: Pruners, each as NAME[,key=value...].
        repeats: Number of runs of each configuration.
        out: Path of the JSON file.
    """

    images: tuple[Path, ...]
    quality: tuple[Path, ...]
    model: str
    arms: tuple[str, ...]
    repeats: int
    out: Path


def run_vision_benchmark(plan: VisionBenchmark) -> None:
    """Run the benchmark and write the JSON.

    Raises:
        ConfigError: An image, an arm or the output path cannot be used.
    """
    record.check_output_path(plan.out)
    if len(plan.images) < 4:
        raise ConfigError(f"--image: expected at least four images, got {len(plan.images)}")
    for path in (*plan.images, *plan.quality):
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
    selections = {_label(s): s for s in map(parse_assignments, plan.arms)}
    for selection in selections.values():
        plugins().resolve("pruner", selection)
    pruners = {label: {"name": s.name, **s.options} for label, s in selections.items()}
    folder = registry.resolve_model(plan.model)
    records = _engines(plan, folder, pruners) if plan.repeats else []
    if plan.quality:
        records += vision_quality.measure_retention(Path(folder), plan.quality)
    record.write_records(plan.out, records)


def _label(selection: Selection) -> str:
    options = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in selection.options.items())
    return "@".join([selection.name, *options])


def _cases(images: tuple[Path, ...]) -> dict[str, list[dict[str, Any]]]:
    one = [{"prompt": f"<image>\n{PROMPT}", "images": [str(p)]} for p in images[:4]]
    two = {"prompt": f"<image> and <image>\n{PROMPT}", "images": [str(p) for p in images[:2]]}
    return {"single": one[:1], "two_images": [two], "batch_4": one}


def _engines(plan: VisionBenchmark, folder: str, asked: dict[str, Any]) -> list[Record]:
    """Run all arms interleaved: those that prune between layers have an engine each, the others share one."""
    inside = {label: s for label, s in asked.items() if "experimental_layers" in s}
    cases, answers = _cases(plan.images), {}
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
        **share_gpu(2),
    }
    number = 0
    with ExitStack() as stack, counting_bar() as bar:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def begin(pruner: dict[str, Any]) -> EngineProcess:
            key = {"additional_config": {"pilotfish": {"pruner": pruner}}}
            return stack.enter_context(EngineProcess({**config, **key}, logs / "engine.log", worker=WORKER))

        shared = begin({"name": "globalcom2", "retain": 1.0})
        task = bar.add_task("images", total=(plan.repeats + 1) * len(cases) * (1 + len(asked)))
        arms: list[tuple[str, Any, Any]] = [(STOCK, shared, None)]
        arms += [(label, shared, s) for label, s in asked.items() if label not in inside]
        for label, selection in inside.items():
            arms.append((label, begin(selection), None))
        for repeat in range(plan.repeats + 1):
            for case, requests in cases.items():
                for label, engine, selection in arms:
                    number += 1
                    answer = engine.ask(do="look", requests=requests, pruner=selection, run=number)
                    if repeat:  # the first one warms up
                        answers.setdefault((case, label), []).append(answer)
                    bar.advance(task)
    return [r for (case, label), runs in answers.items() for r in _records(case, label, runs, answers[case, STOCK])]


def _records(case: str, label: str, runs: list[dict[str, float]], stock: list[dict[str, float]]) -> list[Record]:
    records = []
    for metric in TWICE:
        values = [r.get(metric, 0.0) for r in runs]
        records.append(Record("vision", case, label, metric, round(statistics.median(values), 5), "s", values))
        base = [r.get(metric, 0.0) for r in stock]
        if label != STOCK and metric in ("language_cpu_s", "ttft_s"):
            name = {"language_cpu_s": "prefill_speedup", "ttft_s": "ttft_speedup"}[metric]
            ratios = [b / v for b, v in zip(base, values, strict=True)]
            records.append(Record("vision", case, label, name, round(statistics.median(ratios), 3), "x", ratios))
    for metric in COUNTS:
        records.append(Record("vision", case, label, metric, round(runs[0][metric], 2), "", []))
    return records
