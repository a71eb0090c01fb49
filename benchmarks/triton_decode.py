"""Benchmark of GPU kernels: attention of a decode step with top-k token selection, and vLLM's stock Triton kernel.

python benchmarks/triton_decode.py [--contexts 32768,65536,131072] [--batch 1] [--budget 4096] [--out FILE.json]

The shapes are those of Llama-3-8B. For each context, it reports median microseconds of vLLM's `unified_attention` over
all tokens, of the same kernel with a shortened block table, and of the token selection; and the bandwidth at which each
reads keys and values, relative to that of a plain copy on the same GPU.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.record import Record
from pilotfish.kvcache.kernels import paged_triton
from pilotfish.kvcache.kernels.paged_triton import DeviceBatch
from pilotfish.kvcache.selection import SelectionRule

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
SEGMENTS = 16  # softmax segments of vLLM's kernel for few requests


def microseconds(call: Callable[[], Any], repeats: int = 50) -> list[float]:
    """Return device times of a call in microseconds, after a warm-up, with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for i in range(repeats + 5):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(1e3 * begin.elapsed_time(end))
    return times


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(microseconds(lambda: target.copy_(source), 20)) * 1e-6)


class Step:
    """Decode step of one layer: queries, a filled KV cache, and vLLM's kernel."""

    def __init__(self, context: int, batch: int, dtype: torch.dtype) -> None:
        blocks = batch * -(-context // BLOCK)
        self.query = torch.randn(batch, HEADS, SIZE, device="cuda").to(dtype)
        self.cache = torch.randn(blocks, BLOCK, KV_HEADS, 2 * SIZE, device="cuda").to(dtype).transpose(1, 2)
        numbers = {"dtype": torch.int32, "device": "cuda"}
        table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
        starts, lens = torch.arange(batch + 1, **numbers), torch.full((batch,), context, **numbers)
        self.batch = DeviceBatch(starts, lens, table, context)
        self.output = torch.empty_like(self.query)
        workspace = {"dtype": torch.float32, "device": "cuda"}
        self.segments = (
            torch.empty(batch, HEADS, SEGMENTS, SIZE, **workspace),
            *torch.empty(2, batch, HEADS, SEGMENTS, **workspace),
        )

    def attend(self, table: torch.Tensor, lens: torch.Tensor) -> None:
        """Run vLLM's kernel as its attention backend does."""
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        keys, values = self.cache.transpose(1, 2).split(SIZE, dim=-1)
        unified_attention(
            q=self.query,
            k=keys,
            v=values,
            out=self.output,
            cu_seqlens_q=self.batch.query_start_loc,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=self.batch.max_seq_len,
            softmax_scale=SIZE**-0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // KV_HEADS,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=self.segments[0],
            softmax_segm_max=self.segments[1],
            softmax_segm_expsum=self.segments[2],
        )


def measure(context: int, batch: int, rule: SelectionRule, dtype: torch.dtype, bandwidth: float) -> list[Record]:
    """Measure one context, and return its records."""
    step, scale = Step(context, batch, dtype), SIZE**-0.5

    def choose() -> tuple[torch.Tensor, torch.Tensor]:
        scores = paged_triton.token_scores(step.query, step.cache, step.batch, rule, scale)
        selected = paged_triton.select_tokens(scores, step.batch, rule)
        return paged_triton.shorten_block_table(selected, step.batch, rule, BLOCK)

    short = choose()
    bytes_each = batch * KV_HEADS * SIZE * step.cache.element_size()
    arms: dict[str, tuple[Callable[[], Any], int]] = {
        "none": (lambda: step.attend(step.batch.block_table, step.batch.seq_lens), 2 * bytes_each * context),
        "shortened": (lambda: step.attend(*short), 2 * bytes_each * rule.budget),
        "choice": (choose, bytes_each * context),
    }
    params = {"batch": batch, "context": context, "budget": rule.budget}
    times = {arm: microseconds(call) for arm, (call, _) in arms.items()}
    stock = statistics.median(times["none"])
    records = []
    for arm, (_, moved) in arms.items():
        median = statistics.median(times[arm])
        common = ("kernels", f"context_{context}", arm)
        rate = moved / (median * 1e-6)
        rounded = [round(t, 2) for t in times[arm]]
        records += [
            Record(*common, "kernel_us", round(median, 2), "us", rounded, params),
            Record(*common, "kernel_speedup", round(stock / median, 3), "x", [], params),
            Record(*common, "bandwidth_share", round(rate / bandwidth, 3), "", [], params),
        ]
    return records


def main() -> None:
    """Run the benchmark and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="32768,65536,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    rule = SelectionRule(arguments.budget, 4, arguments.budget // 4, "sum", "page")
    bandwidth = copy_bandwidth()
    records = []
    for context in map(int, arguments.contexts.split(",")):
        records += measure(context, arguments.batch, rule, getattr(torch, arguments.dtype), bandwidth)
    record.write_records(
        arguments.out, records, {"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth}
    )
    for r in records:
        print(f"{r.dataset:16}{r.arm:12}{r.metric:18}{r.value:10.3f} {r.unit}")  # noqa: T201


if __name__ == "__main__":
    main()
