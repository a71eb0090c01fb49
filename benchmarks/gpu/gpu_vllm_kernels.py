"""vLLM's attention kernels with the shapes of gpu_kernels.py: FlashAttention 3 and Triton, full and sparse attention.

python gpu_vllm_kernels.py [--contexts 8192,32768,131072] [--batches 1,8]

Arms that end with ``_whole`` attend to the full context. Arms that end with ``_shortened`` attend to the pages that
TidalDecode's default rule selects, through the shortened block table that the project's kernel writes, as the sparse
layers of an engine do.
"""

import argparse
from collections.abc import Callable

import torch
from gpu_common import Step
from gpu_kernels import Paged, Run, Shape, attention_weights, weighted_values
from torch import Tensor

from pilotfish.integrations.vllm.bench.device_clock import Clock
from pilotfish.kvcache.kernels import paged_triton
from pilotfish.kvcache.selection import SelectionRule

SEGMENTS = 16  # parts of a context in vLLM's Triton kernel for small batches
Attend = Callable[[Tensor, Tensor, int], Tensor]  # (block_table, seq_lens, max_seq_len) -> output


def flash_attention(run: Run, paged: Paged) -> Attend:
    """Return a function that calls FlashAttention 3 as vLLM's backend does."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = paged.cache.transpose(1, 2).split(run.shape.size, dim=-1)
    output = torch.empty_like(paged.query)

    def attend(table: Tensor, lens: Tensor, max_len: int) -> Tensor:
        flash_attn_varlen_func(
            q=paged.query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=paged.batch.query_start_loc,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=max_len,
            softmax_scale=run.shape.scale,
            causal=True,
            block_table=table,
            fa_version=3,
        )
        return output

    return attend


def triton_attention(run: Run, paged: Paged) -> Attend:
    """Return a function that calls vLLM's Triton kernel as its backend does."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    keys, values = paged.cache.transpose(1, 2).split(run.shape.size, dim=-1)
    output, shape = torch.empty_like(paged.query), (paged.requests, run.shape.heads, SEGMENTS)
    segment_output = torch.empty(*shape, run.shape.size, dtype=torch.float32, device=run.device)
    segment_max, segment_expsum = torch.empty(2, *shape, dtype=torch.float32, device=run.device)

    def attend(table: Tensor, lens: Tensor, max_len: int) -> Tensor:
        unified_attention(
            q=paged.query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=paged.batch.query_start_loc,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=max_len,
            softmax_scale=run.shape.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // run.shape.kv_heads,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=segment_output,
            softmax_segm_max=segment_max,
            softmax_segm_expsum=segment_expsum,
        )
        return output

    return attend


def measure(run: Run, context: int, batch: int) -> None:
    """Measure both kernels at one context length and batch size."""
    dataset, rule = f"context_{context}_batch_{batch}", SelectionRule(512, 4, 64, "max", "page")
    paged = Paged(run, context, batch)
    scores = paged_triton.token_scores(paged.query, paged.cache, paged.batch, rule, run.shape.scale)
    selected = paged_triton.select_tokens(scores, paged.batch, rule)
    short_table, short_lens = paged_triton.shorten_block_table(selected, paged.batch, rule, run.shape.block)
    pairs = [paged.text(r) for r in range(batch)]
    expected = torch.stack(
        [weighted_values(attention_weights(paged.query[r], k, run.shape), v) for r, (k, v) in enumerate(pairs)]
    )
    short_expected = torch.full_like(paged.query, float("nan"))
    paged_triton.paged_decode_attention(
        paged.query, paged.cache, paged.batch, rule, run.shape.scale, short_expected, selected
    )
    for name, make in (("flash_attention_3", flash_attention), ("triton_unified", triton_attention)):
        try:
            attend = make(run, paged)
            full = paged.batch.block_table, paged.batch.seq_lens, context
            run.check(dataset, f"{name}_whole", attend(*full), expected)
            run.time(dataset, f"{name}_whole", lambda call=attend, of=full: call(*of), 2 * paged.row_bytes * context)
            # max_seq_len stays that of the full context, as in an engine: the host does not know the shortened lengths.
            short = short_table, short_lens, context
            run.check(dataset, f"{name}_shortened", attend(*short), short_expected.double())
            moved = 2 * paged.row_bytes * rule.budget
            run.time(dataset, f"{name}_shortened", lambda call=attend, of=short: call(*of), moved)
        except Exception as error:
            run.step.fail(f"{dataset}, {name}: {type(error).__name__}: {str(error)[:300]}")


def work(step: Step) -> None:
    """Measure every combination of context length and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768,131072", help="context lengths (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (default: %(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    torch.manual_seed(0)
    clock, shape = Clock("cuda", 30), Shape(32, 8, 128, 16)
    run = Run(step, clock, shape, torch.bfloat16, "cuda", clock.copy_bandwidth())
    step.notes["copy_bytes_per_second"] = round(run.bandwidth)
    for batch in map(int, arguments.batches.split(",")):
        for context in map(int, arguments.contexts.split(",")):
            measure(run, context, batch)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    Step("vllm_kernels").run(work)
