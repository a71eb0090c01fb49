"""Launch options of the Triton kernels: times for combinations of tile, warps, stages and splits.

python gpu_launch.py [--kernels razor_decode,razor_prompt,tree,scores] [--points 8192x32,131072x1]

The constants of `pilotfish.kvcache.kernels` are chosen from these times. A point is a context and a batch size.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_common import Step, print_now
from gpu_kernels import HeadLayer, Paged, Run, Shape

from pilotfish.integrations.vllm.bench.device_clock import Clock
from pilotfish.kvcache.head_window import HeadWindow
from pilotfish.kvcache.kernels import head_cache_triton, paged_triton, tree_triton
from pilotfish.kvcache.kernels.launch import KernelConfig, KernelConfigs
from pilotfish.kvcache.selection import SelectionRule
from pilotfish.plugins.drafting.tree import tree_attention_mask

DECODE = [(2, 3), (4, 2), (4, 3), (4, 4), (8, 2), (8, 3)]  # warps, stages
PROMPT = [(4, 2), (4, 3), (8, 2), (8, 3)]
NODES = 63


def options(tiles: list[int], launches: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Yield combinations of the number of positions in a tile and of launch options."""
    for tile, (num_warps, num_stages) in itertools.product(tiles, launches):
        yield {"tile": tile, "num_warps": num_warps, "num_stages": num_stages}


def razor(run: Run, context: int, batch: int, chunk: int) -> Callable[[], Any]:
    """Return a call of RazorAttention's kernels over the last ``chunk`` tokens of every request."""
    layer = HeadLayer(run, context, batch, HeadWindow(4, 512, 5, True, exact_prefill=False))
    layer.advance(0, context - chunk)
    step = layer.advance(context - chunk, context)
    query = torch.randn(batch * chunk, run.shape.heads, run.shape.size, device=run.device).to(run.dtype)
    output = torch.empty_like(query)

    def call() -> None:
        layer.caches.attend(query, run.shape.scale, output, step)  # keeps `layer`, whose tables the kernels read

    return call


def tree(run: Run, context: int, batch: int) -> Callable[[], Any]:
    """Return a call of tree attention with one random tree per request."""
    paged, rng = Paged(run, context, batch), np.random.default_rng(context)
    masks = [tree_attention_mask(np.array([rng.integers(-1, i) for i in range(NODES)], np.int32)) for _ in range(batch)]
    query = torch.randn(batch * (NODES + 1), run.shape.heads, run.shape.size, device=run.device).to(run.dtype)
    firsts, before = [r * (NODES + 1) for r in range(batch)], context - NODES - 1
    forest = tree_triton.TritonTreeBatch(range(batch), firsts, [before + 1] * batch, masks, torch.device(run.device))
    call = tree_triton.tree_attention
    return partial(call, query, paged.cache, paged.table, forest, run.shape.scale, torch.empty_like(query))


def scores(run: Run, context: int, batch: int) -> Callable[[], Any]:
    """Return a call of TidalDecode's token scores with its default rule."""
    paged, rule = Paged(run, context, batch), SelectionRule(512, 4, 64, "max", "page")
    return partial(paged_triton.token_scores, paged.query, paged.cache, paged.batch, rule, run.shape.scale)


def variants(kernel: str) -> Iterator[tuple[str, Any, dict[str, Any], Callable[..., Callable[[], Any]]]]:
    """Yield the name of each variant, the constants that it replaces and their module, and the maker of its call."""
    if kernel == "razor_decode":
        for o, splits in itertools.product(options([64, 128], DECODE), [512, 1024]):
            constants = {"DECODE": KernelConfigs(KernelConfig(16, **o)), "TARGET_SPLITS": splits}
            yield variant_name(o, splits=splits), head_cache_triton, constants, partial(razor, chunk=1)
    if kernel == "razor_prompt":
        for o, rows in itertools.product(options([64, 128], PROMPT), [64, 128]):
            constants = {"PROMPT": KernelConfigs(KernelConfig(rows, **o))}
            yield variant_name(o, rows=rows), head_cache_triton, constants, partial(razor, chunk=2048)
    if kernel == "tree":
        for o, rows in itertools.product(options([64, 128], PROMPT), [64, 128, 256]):
            constants = {"CONFIGS": KernelConfigs(KernelConfig(rows, **o))}
            yield variant_name(o, rows=rows), tree_triton, constants, tree
    if kernel == "scores":
        for o, programs in itertools.product(options([64, 128], DECODE), [512, 1024, 2048]):
            launch = {k: o[k] for k in ("num_warps", "num_stages")}
            constants = {"TILE": o["tile"], "SCORES_LAUNCH": launch, "TARGET_PROGRAMS": programs}
            yield variant_name(o, programs=programs), paged_triton, constants, scores


def variant_name(o: dict[str, int], **more: int) -> str:
    """Return the name of a variant."""
    return "_".join(f"{k.removeprefix('num_')}{v}" for k, v in (o | more).items())


def work(step: Step) -> None:
    """Time all variants of the selected kernels at all points, and print the best ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="razor_decode,tree,scores,razor_prompt")
    parser.add_argument("--points", default="8192x32,131072x1")
    arguments = parser.parse_args()
    clock = Clock("cuda", 10)
    run = Run(step, clock, Shape(32, 8, 128, 16), torch.bfloat16, "cuda", clock.copy_bandwidth())
    points = [tuple(map(int, p.split("x"))) for p in arguments.points.split(",")]
    for kernel in arguments.kernels.split(","):
        calls: dict[tuple[Any, ...], Callable[[], Any]] = {}
        for variant, module, constants, make in variants(kernel):
            for point in points if kernel != "razor_prompt" else [(32768, 1)]:
                try:
                    with mock.patch.multiple(module, **constants):
                        if point not in calls:
                            calls[point] = make(run, *point)
                        calls[point]()
                        median = statistics.median(clock.times(clock.graph(calls[point])))
                    step.add(f"{kernel}_{point[0]}_batch_{point[1]}", variant, "graph_us", median, "us")
                except Exception as error:  # too much shared memory, for example
                    step.notes.setdefault("failed", []).append(f"{kernel} {variant}: {str(error)[:150]}")
        calls.clear()
        torch.cuda.empty_cache()
    best: dict[str, tuple[float, str]] = {}
    for r in step.records:
        best[r["dataset"]] = min(best.get(r["dataset"], (1e9, "")), (r["value"], r["arm"]))
    step.notes["best"] = best
    for dataset, (value, variant) in best.items():
        print_now(f"{dataset}: {variant}, {value:.1f} us")


if __name__ == "__main__":
    Step("launch").run(work)
