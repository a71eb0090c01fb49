"""The project's Triton kernels on a GPU: errors against a float64 reference, times, and memory bandwidth.

python gpu_kernels.py [--contexts 8192,32768,131072] [--batches 1,8] [--device cpu --tiny]

The shapes are those of one layer of Llama-3-8B: 32 query heads, 8 KV heads, head size 128, blocks of 16 tokens. torch
computes the references in float64. The baselines are dense attention over the same keys and values, by torch's
scaled_dot_product_attention and by two matrix products. Every time is a median with a cold L2 cache: time_us of plain
calls, graph_us of replays of a CUDA graph. bandwidth_share is the number of bytes that must be read, divided by
graph_us, as a fraction of the bandwidth of a copy. With --device cpu --tiny and TRITON_INTERPRET=1 the script runs on a
CPU, which tests the script and the kernels' results.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_common import Step
from torch import Tensor

from pilotfish.integrations.vllm.bench.device_clock import Clock
from pilotfish.kvcache.head_window import HeadWindow
from pilotfish.kvcache.kernels import head_cache_triton, paged_triton, tree_triton
from pilotfish.kvcache.selection import PAGE_SIZE, SelectionRule
from pilotfish.plugins.drafting.tree import tree_attention_mask

MEANS = 2 * 4  # bytes after a block per element of a head: a float32 mean of K and one of V
# Largest ||output - expected|| / ||expected||. With 16-bit dtypes, P is rounded to 16 bits before the product P V.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """Attention shape of one layer.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of KV heads.
        size: Head size.
        block: Number of tokens in a block of the KV cache.
    """

    heads: int
    kv_heads: int
    size: int
    block: int

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.size**-0.5


@dataclass(frozen=True)
class Run:
    """Settings that all measurements share.

    Attributes:
        step: Result file.
        clock: Timer.
        shape: Attention shape.
        dtype: Dtype of the queries and of the KV cache.
        device: "cuda" or "cpu".
        bandwidth: Bandwidth of a copy in bytes per second.
    """

    step: Step
    clock: Clock
    shape: Shape
    dtype: torch.dtype
    device: str
    bandwidth: float

    def ints(self, values: Any) -> Tensor:
        """Return an int32 tensor on the device."""
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def check(self, dataset: str, arm: str, output: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Record the relative error of an output, and fail if it exceeds the tolerance or is NaN."""
        error = float((output.double() - expected).norm() / expected.norm())
        self.step.add(dataset, arm, "relative_error", error, "")
        allowed = TOLERANCE[self.dtype] if tolerance is None else tolerance
        if not error < allowed:
            self.step.fail(f"{dataset}, {arm}: relative error {error:.3g}, allowed {allowed:g}")

    def time(self, dataset: str, arm: str, call: Callable[[], Any], moved: int, **params: Any) -> None:
        """Time a call that must read at least ``moved`` bytes; 0 to record no bandwidth."""
        times = self.clock.times(call)
        self.step.add(dataset, arm, "time_us", statistics.median(times), "us", **params)
        if self.device == "cpu":
            return
        try:
            replayed = self.clock.times(self.clock.graph(call))
        except RuntimeError as error:  # the other measurements continue
            self.step.fail(f"{dataset}, {arm}: not captured in a CUDA graph ({str(error)[:200]})")
            return
        median = statistics.median(replayed)
        self.step.add(dataset, arm, "graph_us", median, "us", bytes=moved, **params)
        if moved:
            self.step.add(dataset, arm, "bandwidth_share", moved / (1e-6 * median) / self.bandwidth, "", **params)


class Paged:
    """A decode step: one query token per request, and a filled paged KV cache whose blocks are in random order."""

    def __init__(self, run: Run, context: int, batch: int) -> None:
        shape, device = run.shape, run.device
        blocks = -(-context // shape.block)
        self.context, self.requests, self.shape = context, batch, shape
        self.query = torch.randn(batch, shape.heads, shape.size, device=device).to(run.dtype)
        # vLLM's layout: adjacent heads of a token in memory, and a view [blocks, kv_heads, block, 2 * size].
        self.cache = torch.randn(
            batch * blocks, shape.block, shape.kv_heads, 2 * shape.size, device=device, dtype=run.dtype
        ).transpose(1, 2)
        self.table = run.ints(torch.randperm(batch * blocks)).view(batch, blocks)
        starts, lens = run.ints(torch.arange(batch + 1)), run.ints([context] * batch)
        self.batch = paged_triton.DeviceBatch(starts, lens, self.table, context)
        # Bytes of K (or of V) per position, for all requests.
        self.row_bytes = batch * shape.kv_heads * shape.size * self.query.element_size()

    def text(self, request: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a request in the order of positions, each [context, kv_heads, size]."""
        rows = self.cache[self.table[request].long()].transpose(1, 2)
        rows = rows.reshape(-1, self.shape.kv_heads, 2 * self.shape.size)[: self.context]
        return rows[..., : self.shape.size], rows[..., self.shape.size :]


def attention_weights(query: Tensor, keys: Tensor, shape: Shape) -> Tensor:
    """Compute the attention weights of one query token in float64, one KV head at a time to save memory.

    Args:
        query: [heads, size].
        keys: [positions, kv_heads, size].
        shape: Attention shape.

    Returns:
        [kv_heads, num_queries_per_kv, positions] float64.
    """
    grouped = query.double().view(shape.kv_heads, -1, shape.size)
    return torch.stack([(grouped[h] @ keys[:, h].double().T * shape.scale).softmax(-1) for h in range(shape.kv_heads)])


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """Compute the attention output of one query token in float64.

    Args:
        weights: [kv_heads, num_queries_per_kv, positions], from `attention_weights`.
        values: [positions, kv_heads, size].

    Returns:
        [heads, size] float64.
    """
    return torch.cat([w @ values[:, h].double() for h, w in enumerate(weights)])


def measure_dense(run: Run, dataset: str, paged: Paged) -> None:
    """Measure the baselines in torch: all positions, with contiguous keys and values."""
    shape, batch = run.shape, paged.requests
    pairs = [paged.text(r) for r in range(batch)]
    keys, values = (torch.stack([x[i] for x in pairs]).transpose(1, 2).contiguous() for i in range(2))
    expected = torch.stack(
        [weighted_values(attention_weights(paged.query[r], k, shape), v) for r, (k, v) in enumerate(pairs)]
    )
    del pairs
    query, moved = paged.query[:, :, None], 2 * paged.row_bytes * paged.context

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    grouped = paged.query.view(batch, shape.kv_heads, -1, shape.size)

    def products() -> Tensor:
        return ((grouped @ keys.transpose(2, 3)) * shape.scale).softmax(-1) @ values

    run.check(dataset, "dense_sdpa", sdpa()[:, :, 0], expected)
    run.time(dataset, "dense_sdpa", sdpa, moved)
    run.check(dataset, "dense_products", products().reshape(batch, shape.heads, shape.size), expected)
    run.time(dataset, "dense_products", products, moved)


def measure_tidal(run: Run, dataset: str, paged: Paged, rule: SelectionRule) -> None:
    """Measure TidalDecode: token scores, selection, sparse attention, and the shortened block table if supported.

    The times of ``_choice`` include the scores.
    """
    batch, scale = paged.batch, run.shape.scale
    arm = f"tidal_{rule.head_aggregation}_{rule.granularity}_{rule.budget}"
    output = torch.full_like(paged.query, float("nan"))

    def score() -> Tensor:
        return paged_triton.token_scores(paged.query, paged.cache, batch, rule, scale)

    def select() -> Tensor:
        return paged_triton.select_tokens(score(), batch, rule)

    scores, selected = score(), select()
    paged_triton.paged_decode_attention(paged.query, paged.cache, batch, rule, scale, output, selected)
    check_tidal(run, dataset, arm, paged, rule, scores, selected, output)

    run.time(dataset, f"{arm}_scores", score, paged.row_bytes * paged.context)
    run.time(dataset, f"{arm}_choice", select, paged.row_bytes * paged.context)
    decode = partial(
        paged_triton.paged_decode_attention, paged.query, paged.cache, batch, rule, scale, output, selected
    )
    run.time(dataset, f"{arm}_decode", decode, 2 * paged.row_bytes * min(rule.budget, paged.context))
    if paged_triton.can_shorten_block_table(rule, run.shape.block):
        check_shortened(run, dataset, arm, paged, rule, selected)
        run.time(
            dataset,
            f"{arm}_shorten",
            lambda: paged_triton.shorten_block_table(selected, batch, rule, run.shape.block),
            0,
        )


def check_tidal(
    run: Run,
    dataset: str,
    arm: str,
    paged: Paged,
    rule: SelectionRule,
    scores: Tensor,
    selected: Tensor,
    output: Tensor,
) -> None:
    """Check the scores and the output against float64, and the selection against the best selection."""
    shape, unit, lost = run.shape, PAGE_SIZE if rule.granularity == "page" else 1, 0.0
    unit_scores, expected_scores, expected_output = [], [], []
    for r in range(paged.requests):
        keys, values = paged.text(r)
        weights = attention_weights(paged.query[r], keys, shape)
        per_group = {
            "kv_head": weights.sum(1),
            "sum": weights.sum((0, 1))[None],
            "max": weights.amax((0, 1))[None],
        }[rule.head_aggregation]
        units = torch.nn.functional.pad(per_group, (0, -paged.context % unit)).unflatten(1, (-1, unit)).sum(-1)
        expected_scores.append(units)
        unit_scores.append(scores[r, :, : units.shape[1]])
        index = torch.arange(units.shape[1], device=run.device)
        always = (index < -(-rule.sinks // unit)) | (index >= max(paged.context - 1 - rule.recent, 0) // unit)
        best = units.masked_fill(always, float("inf")).topk(min(rule.budget // unit, units.shape[1])).indices
        best_mass, mass = (units.gather(1, indices.long()).sum(-1) for indices in (best, selected[r]))
        lost = max(lost, float(((best_mass - mass) / best_mass).max()))
        if not (selected[r].diff(dim=-1) > 0).all():
            run.step.fail(f"{dataset}, {arm}: the selected units are not in ascending order")
        if not all(set(always.nonzero().flatten().tolist()) <= set(row.tolist()) for row in selected[r]):
            run.step.fail(f"{dataset}, {arm}: sinks, recent tokens or the current token are not selected")
        heads = []
        for head in range(shape.heads):
            indices = selected[r, head * selected.shape[1] // shape.heads].long()
            positions = (indices[:, None] * unit + torch.arange(unit, device=run.device)).flatten()
            positions = positions[positions < paged.context]
            kv_head = head * shape.kv_heads // shape.heads
            k, v = keys[positions, kv_head].double(), values[positions, kv_head].double()
            heads.append((paged.query[r, head].double() @ k.T * shape.scale).softmax(-1) @ v)
        expected_output.append(torch.stack(heads))
    run.check(dataset, f"{arm}_scores", torch.stack(unit_scores), torch.stack(expected_scores))
    run.check(dataset, f"{arm}_decode", output, torch.stack(expected_output))
    run.step.add(dataset, f"{arm}_choice", "share_lost", lost, "")  # fraction of the best selection's attention
    if not lost < TOLERANCE[run.dtype]:
        run.step.fail(f"{dataset}, {arm}: the selection has {lost:.3g} less attention than the best selection")


def check_shortened(run: Run, dataset: str, arm: str, paged: Paged, rule: SelectionRule, selected: Tensor) -> None:
    """Check that the shortened block tables contain the blocks of the selected pages, in order."""
    block = run.shape.block
    table, lens = paged_triton.shorten_block_table(selected, paged.batch, rule, block)
    for r in range(paged.requests):
        positions = (selected[r, 0].long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=run.device)).flatten()
        expected = paged.table[r][positions[positions < paged.context][::block] // block]
        if not torch.equal(table[r, : -(-int(lens[r]) // block)], expected):
            run.step.fail(f"{dataset}, {arm}: wrong blocks in the shortened block table of request {r}")


class HeadLayer:
    """One layer with separate blocks per KV head: the first is a retrieval head, the others keep a window."""

    def __init__(self, run: Run, context: int, batch: int, window: HeadWindow) -> None:
        shape, blocks = run.shape, -(-context // run.shape.block)
        item_bytes = torch.empty(0, dtype=run.dtype).element_size()
        page = shape.block * 2 * shape.size + MEANS * shape.size // item_bytes
        self.run, self.window, self.requests = run, window, batch
        memory = torch.full((shape.kv_heads, batch * blocks, page), float("nan"), dtype=run.dtype, device=run.device)
        strides = (page, shape.block * 2 * shape.size, 2 * shape.size, 1)
        caches = [m.as_strided((batch * blocks, 1, shape.block, 2 * shape.size), strides) for m in memory.unbind()]
        self.windowed = [h > 0 for h in range(shape.kv_heads)]
        self.caches = head_cache_triton.TritonHeadCaches(caches, self.windowed, window)
        self.tables = [run.ints(torch.randperm(batch * blocks)).view(batch, blocks) for _ in self.windowed]
        kv_shape = (batch, context, shape.kv_heads, shape.size)
        # The offset makes the means differ from zero.
        self.keys, self.values = (torch.randn(kv_shape, device=run.device, dtype=run.dtype) + 0.3 for _ in range(2))

    def advance(self, begin: int, end: int) -> head_cache_triton.TritonWindowedStep:
        """Store the positions from ``begin`` to ``end`` of all requests, and update the means of evicted tokens."""
        run, block = self.run, self.run.shape.block
        positions = torch.arange(begin, end, device=run.device)
        slots = [(t[:, positions // block].long() * block + positions % block).flatten() for t in self.tables]
        self.caches.bind(self.tables, slots)
        self.caches.store_kv(self.keys[:, begin:end].flatten(0, 1), self.values[:, begin:end].flatten(0, 1))
        starts, count = run.ints(torch.arange(self.requests + 1) * (end - begin)), self.requests
        step = head_cache_triton.TritonWindowedStep(
            starts, run.ints([end] * count), run.ints([0] * count), end - begin, end
        )
        self.caches.update_means(step)
        self._held = slots  # keeps the memory whose addresses the kernels have
        return step

    def expected(self, query: Tensor, request: int, at: int) -> Tensor:
        """Compute the float64 output [heads, size] of a query token [heads, size] at position ``at`` of a request."""
        shape, window = self.run.shape, self.window
        evicted, sinks = window.num_evicted(at, shape.block), window.sink_blocks(shape.block) * shape.block
        out = []
        for q, is_windowed, h in zip(
            query.double().chunk(shape.kv_heads), self.windowed, range(shape.kv_heads), strict=True
        ):
            k, v = (x[request, : at + 1, h].double() for x in (self.keys, self.values))
            bias = torch.zeros(len(k), dtype=torch.float64, device=k.device)
            if is_windowed and evicted:  # compensation token: mean of the evicted tokens, weighted by their number
                end = sinks + evicted
                pair = [torch.cat([x[:sinks], x[end:], x[sinks:end].mean(0)[None]]) for x in (k, v)]
                (k, v), bias = pair, bias[evicted - 1 :].clone()
                bias[-1] = float(np.log(evicted))
            out.append((q @ k.T * shape.scale + bias).softmax(-1) @ v)
        return torch.cat(out)


def measure_razor(run: Run, dataset: str, context: int, batch: int, window: HeadWindow) -> None:
    """Measure RazorAttention: the last chunk of a prompt, where the window moves with each token, and a decode step."""
    shape, layer = run.shape, HeadLayer(run, context, batch, window)
    chunk = min(2048, context // 4)
    layer.advance(0, context - chunk - 1)
    step = layer.advance(context - chunk - 1, context - 1)
    query = torch.randn(batch * chunk, shape.heads, shape.size, device=run.device).to(run.dtype)
    output = torch.full_like(query, float("nan"))
    layer.caches.attend(query, shape.scale, output, step)
    sample = sorted({0, chunk // 3, chunk - 1})
    expected = [layer.expected(query[i], 0, context - 1 - chunk + i) for i in sample]
    run.check(dataset, "razor_prompt", torch.stack([output[i] for i in sample]), torch.stack(expected))
    if bool(output.isnan().any()):
        run.step.fail(f"{dataset}, razor_prompt: no output for some query tokens")
    read = partial(layer.caches.attend, query, shape.scale, output, step)
    run.time(dataset, "razor_prompt", read, 0, tokens=chunk)

    step = layer.advance(context - 1, context)
    query, output = query[:batch].clone(), torch.full_like(query[:batch], float("nan"))
    layer.caches.attend(query, shape.scale, output, step)
    expected = [layer.expected(query[r], r, context - 1) for r in range(batch)]
    run.check(dataset, "razor_decode", output, torch.stack(expected))
    retained = context - window.num_evicted(context - 1, shape.block)
    moved = batch * 2 * shape.size * query.element_size() * (context + (shape.kv_heads - 1) * retained)
    read = partial(layer.caches.attend, query, shape.scale, output, step)
    run.time(dataset, "razor_decode", read, moved)
    run.time(dataset, "razor_means", partial(layer.caches.update_means, step), 0)


def measure_trees(run: Run, dataset: str, paged: Paged, nodes: int) -> None:
    """Measure tree attention: a random tree of draft tokens at the end of each context."""
    shape, context = run.shape, paged.context
    rng = np.random.default_rng(context)
    parents = [np.array([rng.integers(-1, i) for i in range(nodes)], np.int32) for _ in range(paged.requests)]
    masks = [tree_attention_mask(p) for p in parents]
    query_len, before = nodes + 1, context - nodes - 1
    query = torch.randn(paged.requests * query_len, shape.heads, shape.size, device=run.device).to(run.dtype)
    output = torch.full_like(query, float("nan"))
    firsts = [r * query_len for r in range(paged.requests)]
    forest = tree_triton.TritonTreeBatch(
        range(paged.requests), firsts, [before + 1] * paged.requests, masks, torch.device(run.device)
    )
    read = partial(tree_triton.tree_attention, query, paged.cache, paged.table, forest, shape.scale, output)
    read()
    outputs, expected = [], []
    for r in range(paged.requests):
        keys, values = paged.text(r)
        for node in sorted({0, nodes // 2, nodes}):
            attended = torch.cat(
                [torch.arange(before), before + torch.from_numpy(np.flatnonzero(masks[r][node]).astype(np.int64))]
            ).to(run.device)
            outputs.append(output[firsts[r] + node])
            weights = attention_weights(query[firsts[r] + node], keys[attended], shape)
            expected.append(weighted_values(weights, values[attended]))
    run.check(dataset, f"tree_{nodes}", torch.stack(outputs), torch.stack(expected))
    if bool(output.isnan().any()):
        run.step.fail(f"{dataset}, tree_{nodes}: no output for some query tokens")
    run.time(dataset, f"tree_{nodes}", read, 2 * paged.row_bytes * context)


def measure(run: Run, context: int, batch: int, tiny: bool) -> None:
    """Measure all kernels at one context length and batch size; an exception in one does not stop the others."""
    dataset = f"context_{context}_batch_{batch}"
    paged = Paged(run, context, batch)
    small, large = (128, 192) if tiny else (512, 4096)
    window = HeadWindow(4, 64 if tiny else 512, 5, True, exact_prefill=False)
    parts: dict[str, Callable[[], None]] = {
        "dense": lambda: measure_dense(run, dataset, paged),
        "tidal, default": lambda: measure_tidal(
            run, dataset, paged, SelectionRule(small, 4, small // 8, "max", "page")
        ),
        "tidal, large": lambda: measure_tidal(run, dataset, paged, SelectionRule(large, 4, large // 8, "sum", "page")),
        "tidal, KV heads": lambda: measure_tidal(
            run, dataset, paged, SelectionRule(small, 4, small // 8, "kv_head", "token")
        ),
        "trees": lambda: measure_trees(run, dataset, paged, 8 if tiny else 63),
        "razor": lambda: measure_razor(run, dataset, context, batch, window),
    }
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            run.step.fail(f"{dataset}, {name}: {type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def work(step: Step) -> None:
    """Measure every combination of context length and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768,131072", help="context lengths (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a run with TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    torch.manual_seed(0)
    # Triton's interpreter computes wrong results with bfloat16.
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    shape = Shape(8, 2, 32, 16) if arguments.tiny else Shape(32, 8, 128, 16)
    contexts = [300] if arguments.tiny else [int(c) for c in arguments.contexts.split(",")]
    batches = [1, 2] if arguments.tiny else [int(b) for b in arguments.batches.split(",")]
    clock = Clock(arguments.device, 30)
    bandwidth = clock.copy_bandwidth()
    step.notes |= {"copy_bytes_per_second": round(bandwidth), "shape": vars(shape), "dtype": str(dtype)}
    run = Run(step, clock, shape, dtype, arguments.device, bandwidth)
    for batch in batches:
        for context in contexts:
            measure(run, context, batch, arguments.tiny)


if __name__ == "__main__":
    Step("kernels").run(work)
