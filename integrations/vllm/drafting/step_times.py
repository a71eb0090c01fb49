"""How long this machine takes for steps of more and more rows: measured when an engine starts.

The times are kept in the user's cache, the least of each size over the first starts of a model: one start may meet a
busy machine, and would be believed for ever. They tell how further rows of a step grow dearer, which `StepCost` goes on
to correct by the steps that really happen.
"""

import hashlib
import json
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

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 129)  # rows of a step
REPEATS = 7
STARTS = 3  # that measure
StepTimes = dict[int, float]  # rows -> seconds


def measure_when_ready(runner: Any, engine: Engine, most: int, receive: Callable[[StepTimes], None]) -> None:
    """Measure as soon as the runner can run steps, or take what was measured before.

    Args:
        runner: vLLM's model runner, on every tensor-parallel rank.
        engine: The facts that decide whether earlier times hold.
        most: Largest number of rows that matters.
        receive: Is given the times.
    """
    if runner.vllm_config.parallel_config.data_parallel_size > 1:
        return  # the ranks would have to agree, also across machines
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
    """Times from the cache, or measured; all ranks do the same."""
    sizes, path, tp = [n for n in SIZES if n <= most], _path(runner, engine), get_tp_group()
    known, starts = tp.broadcast_object(_read(path) if tp.rank_in_group == 0 else None)
    if starts < STARTS or not set(sizes) <= known.keys():
        now = measure_step_times(runner, sizes)
        known = known | {n: min(t, known.get(n, t)) for n, t in now.items()}
        if tp.rank_in_group == 0:
            _write(path, known, starts + 1)
            rows = ", ".join(f"{n}: {1000 * t:.1f}" for n, t in known.items())
            log.logger.info("pilotfish: milliseconds of a step by its rows, measured: %s", rows)
    return {n: known[n] for n in sizes}


@torch.inference_mode()
def measure_step_times(runner: Any, sizes: list[int]) -> StepTimes:
    """Least seconds of the model, its logits and their candidates for steps of ``sizes`` rows.

    Attention to earlier tokens is left out.
    """
    model, taken = runner.model, {n: [] for n in sizes}
    for repeat in range(REPEATS + 1):
        for n in sizes:  # in turn, so that a busy moment meets all
            started = time.perf_counter()
            hidden, _ = runner._dummy_run(n, skip_eplb=True)
            logits = model.compute_logits(hidden[:n])
            if logits is not None:
                top_k(logits, 8)[1].sum().item()  # waits for the device
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


def _read(path: Path) -> tuple[StepTimes, int]:
    """What is known, and of how many starts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        times = {int(n): float(t) for n, t in content["times"].items()}
        starts = int(content["starts"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}, 0  # none yet, or not ours
    return {n: t for n, t in times.items() if 0 < t < float("inf")}, starts


def _write(path: Path, times: StepTimes, starts: int) -> None:
    try:
        write_text(path, json.dumps({"times": dict(sorted(times.items())), "starts": starts}))
    except OSError as error:  # a cache is a convenience
        log.logger.warning("pilotfish: step times are not kept: %s", error)
