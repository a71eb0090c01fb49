"""vLLM's own attention kernels over the shapes of gpu_kernels.py: FlashAttention 3 and Triton, whole and shortened.

python gpu_vllm_kernels.py [--contexts 8192,32768,131072] [--batches 1,8]

``shortened`` reads what TidalDecode's default rule chose, through the block table that the project's kernel wrote: what
the sparse layers of an engine do.
"""

import argparse
from collections.abc import Callable

import torch
from gpu_common import Clock, Step
from gpu_kernels import Paged, Run, Shape, mixed, weights
from torch import Tensor

from pilotfish.kvcache.kernels import paged_triton
from pilotfish.kvcache.selection import SelectionRule

SEGMENTS = 16  # of vLLM's Triton kernel for few requests
Attend = Callable[[Tensor, Tensor, int], Tensor]  # block table, lengths, longest


def flash(run: Run, paged: Paged) -> Attend:
    """FlashAttention 3, as vLLM's backend calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = paged.cache.transpose(1, 2).split(run.shape.size, dim=-1)
    output = torch.empty_like(paged.query)

    def attend(table: Tensor, lens: Tensor, longest: int) -> Tensor:
        flash_attn_varlen_func(
            q=paged.query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=paged.batch.query_start_loc,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=longest,
            softmax_scale=run.shape.scale,
            causal=True,
            block_table=table,
            fa_version=3,
        )
        return output

    return attend


def unified(run: Run, paged: Paged) -> Attend:
    """vLLM's Triton kernel, as its backend calls it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    keys, values = paged.cache.transpose(1, 2).split(run.shape.size, dim=-1)
    output, shape = torch.empty_like(paged.query), (paged.requests, run.shape.heads, SEGMENTS)
    parts = torch.empty(*shape, run.shape.size, dtype=torch.float32, device=run.device)
    tops, sums = torch.empty(2, *shape, dtype=torch.float32, device=run.device)

    def attend(table: Tensor, lens: Tensor, longest: int) -> Tensor:
        unified_attention(
            q=paged.query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=paged.batch.query_start_loc,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=longest,
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
            softmax_segm_output=parts,
            softmax_segm_max=tops,
            softmax_segm_expsum=sums,
        )
        return output

    return attend


def measure(run: Run, context: int, batch: int) -> None:
    """Both kernels over one context."""
    dataset, rule = f"context_{context}_batch_{batch}", SelectionRule(512, 4, 64, "max", "page")
    paged = Paged(run, context, batch)
    scores = paged_triton.token_scores(paged.query, paged.cache, paged.batch, rule, run.shape.scale)
    kept = paged_triton.select_tokens(scores, paged.batch, rule)
    short_table, short_lens = paged_triton.shorten_block_table(kept, paged.batch, rule, run.shape.block)
    texts = [paged.text(r) for r in range(batch)]
    expected = torch.stack([mixed(weights(paged.query[r], k, run.shape), v) for r, (k, v) in enumerate(texts)])
    short_expected = torch.full_like(paged.query, float("nan"))
    paged_triton.paged_decode_attention(
        paged.query, paged.cache, paged.batch, rule, run.shape.scale, short_expected, kept
    )
    for name, make in (("flash_attention_3", flash), ("triton_unified", unified)):
        try:
            attend = make(run, paged)
            whole = paged.batch.block_table, paged.batch.seq_lens, context
            run.check(dataset, f"{name}_whole", attend(*whole), expected)
            run.time(dataset, f"{name}_whole", lambda call=attend, of=whole: call(*of), 2 * paged.row_bytes * context)
            # The longest length is the whole one, as in an engine, where the host does not know the shortened ones.
            short = short_table, short_lens, context
            run.check(dataset, f"{name}_shortened", attend(*short), short_expected.double())
            moved = 2 * paged.row_bytes * rule.budget
            run.time(dataset, f"{name}_shortened", lambda call=attend, of=short: call(*of), moved)
        except Exception as error:
            run.step.fail(f"{dataset}, {name}: {type(error).__name__}: {str(error)[:300]}")


def work(step: Step) -> None:
    """Shapes in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--batches", default="1,8")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
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
