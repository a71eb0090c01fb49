"""Benchmark of the kernels of device drafters: times of one step by batch size, without a model.

The texts repeat a random phrase, so that a drafter finds what it looks for. Every step has the largest number of rows
of logits, as if all draft tokens were verified, and the logits are random.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pilotfish._internal.lazy_import import torch

from ....plugins.config import ConfigError, parse_assignments
from ....plugins.contracts import DeviceBatch, DeviceDrafter, DeviceLimits, Engine
from ....plugins.manager import plugins
from ....plugins.terminal import make_table, print_plain
from ...bench import record
from ...bench.record import Record
from ..drafting.compatibility import has_device_drafter
from .device_clock import Clock

PHRASE = 64  # tokens after which a text repeats itself
REPEATS = 30


@dataclass(frozen=True)
class KernelBenchmark:
    """Settings of the benchmark; see `pilotfish bench kernels --help`."""

    arms: tuple[str, ...]
    device: str
    batches: tuple[int, ...]
    context: int
    vocab_size: int
    num_speculative_tokens: int
    trees: bool
    out: Path


def run_kernel_benchmark(plan: KernelBenchmark) -> None:
    """Measure all drafters at all batch sizes, print a table and write the results.

    On a CPU the kernels are interpreted, which shows that they run and nothing about their speed.

    Raises:
        ConfigError: The device does not exist, or a drafter has no counterpart on the device.
    """
    record.check_output_path(plan.out)
    drafters = [(arm, *plugins().resolve("drafter", parse_assignments(arm.replace("@", ",")))) for arm in plan.arms]
    steps = plan.num_speculative_tokens
    largest = Engine("random weights", plan.vocab_size, plan.context, max(plan.batches), steps, device=plan.device)
    for arm, cls, options in drafters:
        if not has_device_drafter(cls):
            raise ConfigError(f"--arms: {arm} has no kernels, it drafts on the host")
        cls.check_device(options, largest, plan.trees)  # type: ignore[attr-defined]
    if find_spec("triton") is None:
        raise ConfigError("bench kernels: Triton is not installed, and all kernels are written in it")
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; --device cpu interprets the kernels")
    if plan.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    torch.manual_seed(0)
    records: list[Record] = []
    suffix = "@verification=tree" if plan.trees else ""
    for arm, cls, options in drafters:
        for batch in plan.batches:
            limits = DeviceLimits(torch.device(plan.device), batch, steps, plan.context, plan.trees)
            engine = replace(largest, max_num_seqs=batch)
            drafter = cls.device_drafter(options, engine, limits)  # type: ignore[attr-defined]
            if plan.trees and drafter.parents is None:
                raise ConfigError(f"--trees: {arm} proposes chains only")
            records += measure_step(plan, arm + suffix, drafter, limits)
    record.write_records(plan.out, records)
    print_plain(table(records))


def measure_step(plan: KernelBenchmark, arm: str, drafter: DeviceDrafter, limits: DeviceLimits) -> Iterator[Record]:
    """Measure the parts of a step of all requests, and the memory that the drafter holds."""
    from ....plugins.drafting.top_k_triton import top_k_probs

    clock, b = Clock(plan.device, REPEATS), limits.max_num_reqs
    # Triton's interpreter computes wrong results with bfloat16.
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    rows = b * (limits.num_speculative_tokens + 1)
    logits = torch.randn(rows, plan.vocab_size, dtype=dtype, device=limits.device)
    batch = step_of(limits, plan.vocab_size, *top_k_probs(logits, drafter.candidates))
    for req_idx in range(b):
        drafter.start(req_idx, batch.all_token_ids[req_idx, : plan.context // 2])
    parts: dict[str, Callable[[], Any]] = {
        "top_k": lambda: top_k_probs(logits, drafter.candidates),
        "observe": lambda: drafter.observe(batch),
        "propose": lambda: drafter.propose(batch),
    }
    params = {
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "CPU, interpreted",
        "context": plan.context,
        "vocab_size": plan.vocab_size,
        "num_speculative_tokens": limits.num_speculative_tokens,
    }
    for name, call in parts.items():
        measured = {"time": call}
        if plan.device == "cuda":
            measured["graph"] = clock.graph(call)
        for how, timed in measured.items():
            runs = clock.times(timed)
            value = round(statistics.median(runs), 2)
            yield Record("kernels", f"batch_{b}", arm, f"{name}_{how}_us", value, "µs", runs, params)
    yield Record("kernels", f"batch_{b}", arm, "device_memory_bytes", drafter.nbytes, "bytes", [], params)


def step_of(limits: DeviceLimits, vocab_size: int, candidate_ids: Any, candidate_probs: Any) -> DeviceBatch:
    """Return a step in which every request has accepted half of its draft tokens."""
    b, logits, length = limits.max_num_reqs, limits.num_speculative_tokens + 1, limits.max_model_len
    sampled = logits // 2 + 1
    phrases = torch.randint(vocab_size, (b, PHRASE), dtype=torch.int32)
    texts = phrases.repeat(1, -(-length // PHRASE))[:, :length].contiguous()
    first = length - sampled - logits  # position of the first row of logits; all rows lie within the text
    positions = torch.arange(first, first + logits).repeat(b)
    of_trees = {}
    if limits.trees:  # a chain as a tree: its rows cost the same as those of other trees
        row = torch.arange(logits, dtype=torch.int32, device=limits.device).repeat(b)
        chain_only = torch.zeros(b, dtype=torch.bool, device=limits.device)
        of_trees = {"parents": row - 1, "accepted": row < sampled, "chain_only": chain_only}
    return DeviceBatch(
        num_requests=b,
        max_num_logits=logits,
        idx_mapping=torch.arange(b, device=limits.device),
        all_token_ids=texts.to(limits.device),
        total_len=torch.full((b,), first + 1 + sampled, dtype=torch.int32, device=limits.device),
        num_sampled=torch.full((b,), sampled, dtype=torch.int32, device=limits.device),
        cu_num_logits=torch.arange(0, b * logits + 1, logits, dtype=torch.int32, device=limits.device),
        input_ids=texts[:, first : first + logits].reshape(-1).to(limits.device),
        positions=positions.to(limits.device),
        candidate_ids=candidate_ids,
        candidate_probs=candidate_probs,
        **of_trees,
    )


def table(records: list[Record]) -> Any:
    """Return a table of the times: one row for each drafter and batch size."""
    metrics = list(dict.fromkeys(r.metric for r in records if r.unit == "µs"))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        found.setdefault((r.arm, r.dataset), {})[r.metric] = r.value
    titles = [f"{metric.removesuffix('_us').removesuffix('_time').replace('_', ' ')}, µs" for metric in metrics]
    result = make_table("drafter", "batch", *titles, "MiB", numbers=("batch", *titles, "MiB"))
    for (arm, dataset), values in found.items():
        cells = [f"{values[metric]:,.0f}" for metric in metrics]
        memory = f"{values['device_memory_bytes'] / 2**20:,.1f}"
        result.add_row(arm, dataset.removeprefix("batch_"), *cells, memory)
    return result
