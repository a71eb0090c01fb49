"""Batch-size latency profile: duration of a step by its number of query tokens, measured when an engine starts.

The times are stored in the user's cache folder. For each size the minimum over the first starts that measured it is
kept, since the machine may be busy during one of them. The profile gives the relative cost of larger steps, which
`StepCostModel` then corrects by the durations of real steps.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tp_group

from pilotfish._internal.atomic_write import write_text
from pilotfish._internal.cache_dir import cache_dir
from pilotfish._internal.cpp_build import processor

from ....plugins.contracts import Engine
from ..engine import log, vllm_api
from .top_k import top_k

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 129)  # numbers of query tokens of a step
REPEATS = 7
SECONDS = 20.0  # after which no further repetition starts, since large steps of a large model may take seconds
STARTS = 3  # number of starts that measure a size
StepTimes = dict[int, float]  # number of query tokens -> seconds


def measure_when_ready(runner: Any, engine: Engine, most: int, receive: Callable[[StepTimes], None]) -> None:
    """Wrap the model runner so that step times are measured, or read from the cache, once it can run steps.

    Args:
        runner: vLLM's model runner; to be called on every tensor-parallel rank.
        engine: Facts about the engine, which decide whether cached times apply.
        most: Largest number of query tokens to measure.
        receive: Callback that receives the times.
    """
    if runner.vllm_config.parallel_config.data_parallel_size > 1:
        return  # the ranks would have to agree, across machines too
    graphs = engine.device == "cuda" and not runner.vllm_config.model_config.enforce_eager
    name = "capture_model" if graphs else "initialize_kv_cache"
    original = getattr(runner, name)

    def then_measure(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not kwargs.get("is_profiling", False):
            setattr(runner, name, original)
            receive(_times(runner, engine, min(most, runner.max_num_tokens)))
        return result

    setattr(runner, name, then_measure)


def _times(runner: Any, engine: Engine, most: int) -> StepTimes:
    """Return the times from the cache, or measure them; all ranks do the same."""
    sizes, path, tp = [n for n in SIZES if n <= most], _path(runner, engine), get_tp_group()
    known, starts = tp.broadcast_object(_read(path) if tp.rank_in_group == 0 else None)
    # Sizes are counted one by one: an engine with longer drafts measures sizes that earlier engines did not.
    missing = [n for n in sizes if starts.get(n, 0) < STARTS]
    if missing:
        now = measure_step_times(runner, sizes)
        # A busy machine slows all sizes down, but only new ones would keep these times.
        slower = [now[n] / known[n] for n in sizes if n in known]
        load = max(1.0, statistics.median(slower)) if slower else 1.0
        known = known | {n: min(now[n] / load, known.get(n, now[n])) for n in missing}
        if tp.rank_in_group == 0:
            _write(path, known, starts | {n: starts.get(n, 0) + 1 for n in missing})
            text = ", ".join(f"{n}: {1000 * known[n]:.1f}" for n in sizes)
            log.logger.info("pilotfish: measured step times in ms, by number of query tokens: %s (%s)", text, path)
    return {n: known[n] for n in sizes}


@torch.inference_mode()
def measure_step_times(runner: Any, sizes: list[int]) -> StepTimes:
    """Measure steps: the model, its logits and their top-k candidates, without attention to earlier tokens.

    Args:
        runner: vLLM's model runner.
        sizes: Numbers of query tokens.

    Returns:
        Minimum seconds for each size.
    """
    model, taken, tp = runner.model, {n: [] for n in sizes}, get_tp_group()
    began = time.perf_counter()
    for repeat in range(REPEATS + 1):
        # The first rank decides, since every step needs all of them. One repetition follows the warm-up in any case.
        if repeat > 1 and tp.broadcast_object(time.perf_counter() - began > SECONDS):
            break
        for n in sizes:  # interleaved, so that other load on the machine affects all sizes
            started = time.perf_counter()
            hidden, _ = runner._dummy_run(n, skip_eplb=True)
            logits = model.compute_logits(hidden[:n])
            if logits is not None:
                top_k(logits, 8)[1].sum().item()  # synchronises with the device
                logits.argmax(-1).sum().item()
            if repeat:  # the first round warms up
                taken[n].append(time.perf_counter() - started)
    return {n: min(times) for n, times in taken.items()}


def _path(runner: Any, engine: Engine) -> Path:
    config = runner.vllm_config.model_config
    facts = [
        config.model,
        engine.fingerprint,
        engine.dtype,
        str(config.quantization),
        config.enforce_eager,
        engine.tensor_parallel_size,
        torch.cuda.get_device_name() if engine.device == "cuda" else f"{torch.get_num_threads()} threads",
        vllm_api.installed_version(),
        processor(),
    ]
    return cache_dir() / "steps" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> tuple[StepTimes, dict[int, int]]:
    """Return the cached times, and for each size the number of starts that measured it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        times = {int(n): float(t) for n, t in content["times"].items()}
        starts = {int(n): int(count) for n, count in content["starts"].items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}, {}  # missing or not in our format
    times = {n: t for n, t in times.items() if 0 < t < float("inf")}
    return times, {n: count for n, count in starts.items() if n in times}


def _write(path: Path, times: StepTimes, starts: dict[int, int]) -> None:
    try:
        write_text(path, json.dumps({"times": dict(sorted(times.items())), "starts": dict(sorted(starts.items()))}))
    except OSError as error:  # the cache is optional
        log.logger.warning("pilotfish: step times could not be cached: %s", error)
