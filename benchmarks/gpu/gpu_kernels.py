"""The project's Triton kernels on a GPU: right within rounding, and how near they come to the card's bandwidth.

python gpu_kernels.py [--contexts 8192,32768,131072] [--batches 1,8] [--device cpu --tiny]

Shapes are those of one layer of Llama-3-8B: 32 query heads, 8 KV heads of 128 numbers, blocks of 16 tokens. References
are computed by torch in float64. Beside the kernels: dense attention over the same keys and values by torch's
scaled_dot_product_attention, and by two matrix products. Each time is a median with a cold L2 cache, called plainly and
replayed from a CUDA graph; ``bandwidth_share`` is the bytes that must be read over the graph's time, beside what a copy
reaches. With --device cpu --tiny (and TRITON_INTERPRET=1) all of it runs on a CPU, for tests of this script.
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
from gpu_common import Clock, Step
from torch import Tensor

from pilotfish.kvcache.head_window import HeadWindow
from pilotfish.kvcache.kernels import head_cache_triton, paged_triton, tree_triton
from pilotfish.kvcache.selection import PAGE_SIZE, SelectionRule
from pilotfish.plugins.drafting.tree import tree_attention_mask

MEANS = 2 * 4  # bytes behind a block for each number of a head: a float32 mean of K and one of V
# Of ||found - expected|| / ||expected||. Products of 16-bit numbers are rounded to 16 bits once before P times V.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """One layer's attention."""

    heads: int
    kv_heads: int
    size: int
    block: int

    @property
    def scale(self) -> float:
        return self.size**-0.5


@dataclass(frozen=True)
class Run:
    """What every measurement needs."""

    step: Step
    clock: Clock
    shape: Shape
    dtype: torch.dtype
    device: str
    bandwidth: float

    def ints(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def check(self, dataset: str, arm: str, found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Compare with the reference; NaN never passes."""
        error = float((found.double() - expected).norm() / expected.norm())
        self.step.add(dataset, arm, "relative_error", error, "")
        allowed = TOLERANCE[self.dtype] if tolerance is None else tolerance
        if not error < allowed:
            self.step.fail(f"{dataset}, {arm}: relative error {error:.3g}, allowed {allowed:g}")

    def time(self, dataset: str, arm: str, call: Callable[[], Any], moved: int, **params: Any) -> None:
        """Time a call that has to read ``moved`` bytes."""
        plain = self.clock.times(call)
        self.step.add(dataset, arm, "time_us", statistics.median(plain), "us", **params)
        if self.device == "cpu":
            return
        try:
            replayed = self.clock.times(self.clock.graph(call))
        except RuntimeError as error:  # a call that cannot be captured is a finding, not the end
            self.step.fail(f"{dataset}, {arm}: not captured in a graph ({str(error)[:200]})")
            return
        median = statistics.median(replayed)
        self.step.add(dataset, arm, "graph_us", median, "us", bytes=moved, **params)
        if moved:
            self.step.add(dataset, arm, "bandwidth_share", moved / (1e-6 * median) / self.bandwidth, "", **params)


class Paged:
    """A decode step: one query token of each request over a filled, scattered paged cache."""

    def __init__(self, run: Run, context: int, batch: int) -> None:
        shape, device = run.shape, run.device
        blocks = -(-context // shape.block)
        self.context, self.requests, self.shape = context, batch, shape
        self.query = torch.randn(batch, shape.heads, shape.size, device=device).to(run.dtype)
        # As vLLM lays it out: the heads of a token lie together, and the view has them in front.
        self.cache = torch.randn(
            batch * blocks, shape.block, shape.kv_heads, 2 * shape.size, device=device, dtype=run.dtype
        ).transpose(1, 2)
        self.table = run.ints(torch.randperm(batch * blocks)).view(batch, blocks)
        starts, lens = run.ints(torch.arange(batch + 1)), run.ints([context] * batch)
        self.batch = paged_triton.DeviceBatch(starts, lens, self.table, context)
        self.row_bytes = batch * shape.kv_heads * shape.size * self.query.element_size()  # K, or V, of a position

    def text(self, request: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request in order, each [context, kv_heads, size]."""
        rows = self.cache[self.table[request].long()].transpose(1, 2)
        rows = rows.reshape(-1, self.shape.kv_heads, 2 * self.shape.size)[: self.context]
        return rows[..., : self.shape.size], rows[..., self.shape.size :]


def weights(query: Tensor, keys: Tensor, shape: Shape) -> Tensor:
    """Attention of one token in float64, [kv_heads, share, positions], head by head to spare memory."""
    grouped = query.double().view(shape.kv_heads, -1, shape.size)
    return torch.stack([(grouped[h] @ keys[:, h].double().T * shape.scale).softmax(-1) for h in range(shape.kv_heads)])


def mixed(probabilities: Tensor, values: Tensor) -> Tensor:
    """[heads, size] from [kv_heads, share, positions] and values [positions, kv_heads, size]."""
    return torch.cat([p @ values[:, h].double() for h, p in enumerate(probabilities)])


def dense(run: Run, dataset: str, paged: Paged) -> None:
    """Baselines without the project: all positions, keys and values contiguous."""
    shape, batch = run.shape, paged.requests
    both = [paged.text(r) for r in range(batch)]
    keys, values = (torch.stack([x[i] for x in both]).transpose(1, 2).contiguous() for i in range(2))
    expected = torch.stack([mixed(weights(paged.query[r], k, shape), v) for r, (k, v) in enumerate(both)])
    del both
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


def tidal(run: Run, dataset: str, paged: Paged, rule: SelectionRule) -> None:
    """TidalDecode: score, choose, and read the choice, by a kernel and (where it can) by a shortened block table."""
    batch, scale = paged.batch, run.shape.scale
    arm = f"tidal_{rule.head_aggregation}_{rule.granularity}_{rule.budget}"
    output = torch.full_like(paged.query, float("nan"))

    def score() -> Tensor:
        return paged_triton.token_scores(paged.query, paged.cache, batch, rule, scale)

    def choose() -> Tensor:
        return paged_triton.select_tokens(score(), batch, rule)

    scores, kept = score(), choose()
    paged_triton.paged_decode_attention(paged.query, paged.cache, batch, rule, scale, output, kept)
    check_tidal(run, dataset, arm, paged, rule, scores, kept, output)

    run.time(dataset, f"{arm}_scores", score, paged.row_bytes * paged.context)
    run.time(dataset, f"{arm}_choice", choose, paged.row_bytes * paged.context)
    decode = partial(paged_triton.paged_decode_attention, paged.query, paged.cache, batch, rule, scale, output, kept)
    run.time(dataset, f"{arm}_decode", decode, 2 * paged.row_bytes * min(rule.budget, paged.context))
    if paged_triton.can_shorten_block_table(rule, run.shape.block):
        check_shortened(run, dataset, arm, paged, rule, kept)
        run.time(
            dataset, f"{arm}_shorten", lambda: paged_triton.shorten_block_table(kept, batch, rule, run.shape.block), 0
        )


def check_tidal(
    run: Run, dataset: str, arm: str, paged: Paged, rule: SelectionRule, scores: Tensor, kept: Tensor, output: Tensor
) -> None:
    """Scores and output against float64, and the choice against the best one."""
    shape, unit, lost = run.shape, PAGE_SIZE if rule.granularity == "page" else 1, 0.0
    found_scores, expected_scores, expected_output = [], [], []
    for r in range(paged.requests):
        keys, values = paged.text(r)
        p = weights(paged.query[r], keys, shape)
        per_set = {"kv_head": p.sum(1), "sum": p.sum((0, 1))[None], "max": p.amax((0, 1))[None]}[rule.head_aggregation]
        units = torch.nn.functional.pad(per_set, (0, -paged.context % unit)).unflatten(1, (-1, unit)).sum(-1)
        expected_scores.append(units)
        found_scores.append(scores[r, :, : units.shape[1]])
        number = torch.arange(units.shape[1], device=run.device)
        always = (number < -(-rule.sinks // unit)) | (number >= max(paged.context - 1 - rule.recent, 0) // unit)
        best = units.masked_fill(always, float("inf")).topk(min(rule.budget // unit, units.shape[1])).indices
        best_mass, mass = (units.gather(1, chosen.long()).sum(-1) for chosen in (best, kept[r]))
        lost = max(lost, float(((best_mass - mass) / best_mass).max()))
        if not (kept[r].diff(dim=-1) > 0).all():
            run.step.fail(f"{dataset}, {arm}: units kept are not ascending")
        if not all(set(always.nonzero().flatten().tolist()) <= set(row.tolist()) for row in kept[r]):
            run.step.fail(f"{dataset}, {arm}: sinks, recent positions or the current one are not kept")
        heads = []
        for head in range(shape.heads):
            chosen = kept[r, head * kept.shape[1] // shape.heads].long()
            positions = (chosen[:, None] * unit + torch.arange(unit, device=run.device)).flatten()
            positions = positions[positions < paged.context]
            kv_head = head * shape.kv_heads // shape.heads
            k, v = keys[positions, kv_head].double(), values[positions, kv_head].double()
            heads.append((paged.query[r, head].double() @ k.T * shape.scale).softmax(-1) @ v)
        expected_output.append(torch.stack(heads))
    run.check(dataset, f"{arm}_scores", torch.stack(found_scores), torch.stack(expected_scores))
    run.check(dataset, f"{arm}_decode", output, torch.stack(expected_output))
    run.step.add(dataset, f"{arm}_choice", "share_lost", lost, "")  # of the attention that the best choice holds
    if not lost < TOLERANCE[run.dtype]:
        run.step.fail(f"{dataset}, {arm}: {lost:.3g} of the attention of the best choice is lost")


def check_shortened(run: Run, dataset: str, arm: str, paged: Paged, rule: SelectionRule, kept: Tensor) -> None:
    """The shortened block tables hold the blocks of what was kept, in order."""
    block = run.shape.block
    table, lens = paged_triton.shorten_block_table(kept, paged.batch, rule, block)
    for r in range(paged.requests):
        positions = (kept[r, 0].long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=run.device)).flatten()
        expected = paged.table[r][positions[positions < paged.context][::block] // block]
        if not torch.equal(table[r, : -(-int(lens[r]) // block)], expected):
            run.step.fail(f"{dataset}, {arm}: the shortened block table of request {r} is not what was kept")


class HeadLayer:
    """One layer whose KV heads have blocks of their own: the first keeps everything, the others a window."""

    def __init__(self, run: Run, context: int, batch: int, window: HeadWindow) -> None:
        shape, blocks = run.shape, -(-context // run.shape.block)
        item = torch.empty(0, dtype=run.dtype).element_size()
        page = shape.block * 2 * shape.size + MEANS * shape.size // item
        self.run, self.window, self.requests = run, window, batch
        memory = torch.full((shape.kv_heads, batch * blocks, page), float("nan"), dtype=run.dtype, device=run.device)
        strides = (page, shape.block * 2 * shape.size, 2 * shape.size, 1)
        caches = [m.as_strided((batch * blocks, 1, shape.block, 2 * shape.size), strides) for m in memory.unbind()]
        self.windowed = [h > 0 for h in range(shape.kv_heads)]
        self.caches = head_cache_triton.TritonHeadCaches(caches, self.windowed, window)
        self.tables = [run.ints(torch.randperm(batch * blocks)).view(batch, blocks) for _ in self.windowed]
        drawn = (batch, context, shape.kv_heads, shape.size)
        self.keys, self.values = (
            torch.randn(drawn, device=run.device, dtype=run.dtype) + 0.3
            for _ in range(2)  # means are not zero
        )

    def advance(self, begin: int, end: int) -> head_cache_triton.TritonWindowedStep:
        """Store positions of all requests, and update means."""
        run, block = self.run, self.run.shape.block
        at = torch.arange(begin, end, device=run.device)
        slots = [(t[:, at // block].long() * block + at % block).flatten() for t in self.tables]
        self.caches.bind(self.tables, slots)
        self.caches.store_kv(self.keys[:, begin:end].flatten(0, 1), self.values[:, begin:end].flatten(0, 1))
        starts, count = run.ints(torch.arange(self.requests + 1) * (end - begin)), self.requests
        step = head_cache_triton.TritonWindowedStep(
            starts, run.ints([end] * count), run.ints([0] * count), end - begin, end
        )
        self.caches.update_means(step)
        self._held = slots  # the kernels know their addresses
        return step

    def expected(self, query: Tensor, request: int, at: int) -> Tensor:
        """Attention of one token at a position in float64, [heads, size]."""
        shape, window = self.run.shape, self.window
        gap, sinks = window.num_evicted(at, shape.block), window.sink_blocks(shape.block) * shape.block
        out = []
        for q, leaves_out, h in zip(
            query.double().chunk(shape.kv_heads), self.windowed, range(shape.kv_heads), strict=True
        ):
            k, v = (x[request, : at + 1, h].double() for x in (self.keys, self.values))
            bias = torch.zeros(len(k), dtype=torch.float64, device=k.device)
            if leaves_out and gap:  # the mean of what is left out stands for it, with its number as weight
                both = [torch.cat([x[:sinks], x[sinks + gap :], x[sinks : sinks + gap].mean(0)[None]]) for x in (k, v)]
                (k, v), bias = both, bias[gap - 1 :].clone()
                bias[-1] = float(np.log(gap))
            out.append((q @ k.T * shape.scale + bias).softmax(-1) @ v)
        return torch.cat(out)


def razor(run: Run, dataset: str, context: int, batch: int, window: HeadWindow) -> None:
    """RazorAttention: the end of a prompt, read window by window; then a decode step."""
    shape, layer = run.shape, HeadLayer(run, context, batch, window)
    chunk = min(2048, context // 4)
    layer.advance(0, context - chunk - 1)
    step = layer.advance(context - chunk - 1, context - 1)
    query = torch.randn(batch * chunk, shape.heads, shape.size, device=run.device).to(run.dtype)
    output = torch.full_like(query, float("nan"))
    layer.caches.attend(query, shape.scale, output, step)
    rows = sorted({0, chunk // 3, chunk - 1})
    expected = [layer.expected(query[i], 0, context - 1 - chunk + i) for i in rows]
    run.check(dataset, "razor_prompt", torch.stack([output[i] for i in rows]), torch.stack(expected))
    if bool(output.isnan().any()):
        run.step.fail(f"{dataset}, razor_prompt: some rows were not written")
    read = partial(layer.caches.attend, query, shape.scale, output, step)
    run.time(dataset, "razor_prompt", read, 0, tokens=chunk)

    step = layer.advance(context - 1, context)
    query, output = query[:batch].clone(), torch.full_like(query[:batch], float("nan"))
    layer.caches.attend(query, shape.scale, output, step)
    expected = [layer.expected(query[r], r, context - 1) for r in range(batch)]
    run.check(dataset, "razor_decode", output, torch.stack(expected))
    seen = context - window.num_evicted(context - 1, shape.block)
    moved = batch * 2 * shape.size * query.element_size() * (context + (shape.kv_heads - 1) * seen)
    read = partial(layer.caches.attend, query, shape.scale, output, step)
    run.time(dataset, "razor_decode", read, moved)
    run.time(dataset, "razor_means", partial(layer.caches.update_means, step), 0)


def trees(run: Run, dataset: str, paged: Paged, nodes: int) -> None:
    """Trees of drafted tokens at the end of each context."""
    shape, context = run.shape, paged.context
    shuffle = np.random.default_rng(context)
    parents = [np.array([shuffle.integers(-1, i) for i in range(nodes)], np.int32) for _ in range(paged.requests)]
    masks = [tree_attention_mask(p) for p in parents]
    rows, before = nodes + 1, context - nodes - 1
    query = torch.randn(paged.requests * rows, shape.heads, shape.size, device=run.device).to(run.dtype)
    output = torch.full_like(query, float("nan"))
    firsts = [r * rows for r in range(paged.requests)]
    forest = tree_triton.TritonTreeBatch(
        range(paged.requests), firsts, [before + 1] * paged.requests, masks, torch.device(run.device)
    )
    read = partial(tree_triton.tree_attention, query, paged.cache, paged.table, forest, shape.scale, output)
    read()
    found, expected = [], []
    for r in range(paged.requests):
        keys, values = paged.text(r)
        for node in sorted({0, nodes // 2, nodes}):
            seen = torch.cat(
                [torch.arange(before), before + torch.from_numpy(np.flatnonzero(masks[r][node]).astype(np.int64))]
            ).to(run.device)
            found.append(output[firsts[r] + node])
            expected.append(mixed(weights(query[firsts[r] + node], keys[seen], shape), values[seen]))
    run.check(dataset, f"tree_{nodes}", torch.stack(found), torch.stack(expected))
    if bool(output.isnan().any()):
        run.step.fail(f"{dataset}, tree_{nodes}: some rows were not written")
    run.time(dataset, f"tree_{nodes}", read, 2 * paged.row_bytes * context)


def measure(run: Run, context: int, batch: int, tiny: bool) -> None:
    """All kernels over one context; one that fails does not keep the others from running."""
    dataset = f"context_{context}_batch_{batch}"
    paged = Paged(run, context, batch)
    small, large = (128, 192) if tiny else (512, 4096)
    window = HeadWindow(4, 64 if tiny else 512, 5, True, exact_prefill=False)
    parts: dict[str, Callable[[], None]] = {
        "dense": lambda: dense(run, dataset, paged),
        "tidal, default": lambda: tidal(run, dataset, paged, SelectionRule(small, 4, small // 8, "max", "page")),
        "tidal, large": lambda: tidal(run, dataset, paged, SelectionRule(large, 4, large // 8, "sum", "page")),
        "tidal, KV heads": lambda: tidal(run, dataset, paged, SelectionRule(small, 4, small // 8, "kv_head", "token")),
        "trees": lambda: trees(run, dataset, paged, 8 if tiny else 63),
        "razor": lambda: razor(run, dataset, context, batch, window),
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
    """Shapes and types in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a run under TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    torch.manual_seed(0)
    # Interpreted bfloat16 is nonsense.
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
