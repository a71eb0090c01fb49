"""Choosing and reading positions of a paged KV cache on a GPU, by Triton kernels.

The cache is that of vLLM's Triton and FlashAttention backends, [blocks, kv_heads, block_size, 2 * head_size], K and
then V in the last dimension, in any order of strides.

Everything is decided on the device: which requests of a batch are sparse (one query token, a context beyond the
budget), how long they are, what they keep. No shape depends on it and nothing waits for it, so that all of this can be
captured in a CUDA graph.

Two ways to read a choice:

- `shorten` writes a block table that holds the chosen pages only. Keys are stored after their rotation, so any paged
  attention kernel, vLLM's own, reads the chosen positions through it. For pages that all heads share.
- `decode` reads any positions, each set of heads its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from ..selection import PAGE_SIZE, SelectionRule
from . import programs_triton as kernels

if TYPE_CHECKING:
    from torch import Tensor

TILE = 128  # positions that a program looks at together
SPLIT = 1024  # positions of one program of `programs_triton.unit_scores`
MIN_DOT_ROWS = 16  # of a matrix product on tensor cores


@dataclass(frozen=True)
class DeviceBatch:
    """The requests of a step, as vLLM's metadata names them.

    Attributes:
        query_start_loc: [requests + 1] int32, where each request's query tokens begin.
        seq_lens: [requests] int32, positions before and at a request's last query token.
        block_table: [requests, blocks] int32.
        max_seq_len: An upper bound of ``seq_lens``, known to the host.
    """

    query_start_loc: "Tensor"
    seq_lens: "Tensor"
    block_table: "Tensor"
    max_seq_len: int

    def is_sparse(self, rule: SelectionRule) -> "Tensor":
        """[requests] bool: which requests decode one token beyond the budget."""
        one = self.query_start_loc[1:] - self.query_start_loc[:-1] == 1
        return one & (self.seq_lens > rule.budget)


def token_scores(query: "Tensor", cache: "Tensor", batch: DeviceBatch, rule: SelectionRule, scale: float) -> "Tensor":
    """How much each unit (a page, or a position) matters to each set of heads.

    Args:
        query: [tokens, query_heads, head_size], heads contiguous.
        cache: [blocks, kv_heads, block_size, 2 * head_size].
        batch: The requests.
        rule: How positions are chosen.
        scale: Of the scores.

    Returns:
        [requests, sets, units] float32; what stands there for requests that are not sparse means nothing.
    """
    _check(query, cache, batch)
    requests, (heads, size), kv_heads = len(batch.seq_lens), query.shape[1:], cache.shape[1]
    by_page = rule.granularity == "page"
    # Sums over heads can be taken page by page, which needs a 32nd of the memory; other aggregates cannot.
    unit = PAGE_SIZE if by_page and rule.head_aggregation in ("head", "kv_head", "sum") else 1
    units = -(-batch.max_seq_len // PAGE_SIZE) * PAGE_SIZE // unit
    scores = torch.full((requests, heads, units), float("-inf"), dtype=torch.float32, device=query.device)
    share = heads // kv_heads
    kernels.unit_scores_kernel[(requests, kv_heads, triton.cdiv(units * unit, SPLIT))](
        query,
        cache,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        scores,
        scale,
        rule.budget,
        units,
        query.stride(0),
        *cache.stride()[:3],
        batch.block_table.stride(0),
        HEADS=heads,
        SHARE=share,
        ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(share)),
        SIZE=size,
        SIZE_PADDED=triton.next_power_of_2(size),
        BLOCK=cache.shape[2],
        UNIT=unit,
        TILE=TILE,
        SPLIT=SPLIT,
    )
    totals = scores.logsumexp(-1)
    least = torch.full_like(totals, float("-inf"))
    if rule.head_aggregation == "union":
        least = scores.topk(min(rule.budget - rule.recent, units), sorted=False).values.amin(-1)
    sets = rule.num_head_groups(heads, kv_heads)
    result = torch.empty(requests, sets, units, dtype=torch.float32, device=query.device)
    kernels.token_scores_kernel[(requests, sets, triton.cdiv(units, TILE))](
        scores,
        totals,
        least,
        batch.query_start_loc,
        batch.seq_lens,
        result,
        rule.budget,
        units,
        HEADS=heads,
        SETS=sets,
        TAKE_MAX=rule.head_aggregation == "max",
        TILE=TILE,
    )
    if by_page and unit == 1:
        result = result.view(requests, sets, units // PAGE_SIZE, PAGE_SIZE).sum(-1)
    return result


def select_tokens(scores: "Tensor", batch: DeviceBatch, rule: SelectionRule) -> "Tensor":
    """The units that ``rule`` keeps by the ``scores`` of `importance`.

    Sinks, recent positions and the current one are always among them.

    Returns:
        [requests, sets, budget in units] int32, ascending; what stands there for other requests means nothing.
    """
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    units = scores.shape[-1]
    number = torch.arange(units, device=scores.device)
    context = batch.seq_lens[:, None, None]
    recent = (context - 1 - rule.recent).clamp_min(0) // unit
    always = (number < -(-rule.sinks // unit)) | (number >= recent)
    ranked = scores.masked_fill(always, float("inf")).masked_fill(number * unit >= context, float("-inf"))
    kept = ranked.topk(min(rule.budget // unit, units), sorted=False).indices
    return kept.sort(-1).values.int()


def can_shorten_block_table(rule: SelectionRule, block_size: int) -> bool:
    """Whether a shortened block table can express what ``rule`` keeps: whole blocks that all heads share."""
    shared = rule.head_aggregation in ("sum", "max", "union")
    return shared and rule.granularity == "page" and PAGE_SIZE % block_size == 0


def shorten_block_table(
    kept: "Tensor", batch: DeviceBatch, rule: SelectionRule, block_size: int
) -> tuple["Tensor", "Tensor"]:
    """The batch's block table and lengths, of sparse requests with their kept pages only.

    Args:
        kept: Of `choose`, [requests, 1, pages].
        batch: The requests.
        rule: How they were chosen, see `can_shorten`.
        block_size: Positions of a block.

    Returns:
        [requests, blocks] int32, of which only what the lengths cover is written; [requests] int32.
    """
    requests = len(batch.seq_lens)
    blocks = -(-batch.max_seq_len // block_size)
    table, lens = torch.empty_like(batch.block_table), torch.empty_like(batch.seq_lens)
    kernels.shorten_block_table_kernel[(requests, triton.cdiv(blocks, TILE))](
        batch.block_table,
        kept,
        batch.query_start_loc,
        batch.seq_lens,
        table,
        lens,
        rule.budget,
        kept.shape[-1],
        batch.block_table.stride(0),
        table.stride(0),
        PAGE_BLOCKS=PAGE_SIZE // block_size,
        PAGE=PAGE_SIZE,
        TILE=TILE,
    )
    return table, lens


def paged_decode_attention(
    query: "Tensor",
    cache: "Tensor",
    batch: DeviceBatch,
    rule: SelectionRule,
    scale: float,
    output: "Tensor",
    kept: "Tensor",
) -> None:
    """Attention of sparse requests over the positions they keep; writes their part of ``output``.

    Args:
        query: [tokens, query_heads, head_size], heads contiguous.
        cache: [blocks, kv_heads, block_size, 2 * head_size].
        batch: The requests.
        rule: How positions were chosen.
        scale: Of the scores.
        output: As ``query``.
        kept: Of `choose`.
    """
    _check(query, cache, batch)
    requests, (heads, size), kv_heads = len(batch.seq_lens), query.shape[1:], cache.shape[1]
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    sets, units = kept.shape[1:]
    count = triton.cdiv(units * unit, TILE)
    together = 1 if sets == heads else heads // kv_heads
    workspace: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    parts = torch.empty(requests, heads, count, size, **workspace)
    tops, totals = torch.empty(2, requests, heads, count, **workspace)
    sizes = {"HEADS": heads, "SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size)}
    kernels.sparse_decode_kernel[(requests, heads // together, count)](
        query,
        cache,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        kept,
        parts,
        tops,
        totals,
        scale,
        rule.budget,
        units,
        query.stride(0),
        *cache.stride()[:3],
        batch.block_table.stride(0),
        **sizes,
        SHARE=heads // kv_heads,
        TOGETHER=together,
        ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(together)),
        SETS=sets,
        BLOCK=cache.shape[2],
        UNIT=unit,
        TILE=TILE,
    )
    kernels.merge_decode_splits_kernel[(requests, heads)](
        parts,
        tops,
        totals,
        batch.query_start_loc,
        batch.seq_lens,
        output,
        rule.budget,
        count,
        output.stride(0),
        **sizes,
    )


def _check(query: "Tensor", cache: "Tensor", batch: DeviceBatch) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: shapes or types.
    """
    size = query.shape[-1]
    if cache.shape[3] != 2 * size or query.shape[1] % cache.shape[1] or cache.dtype != query.dtype:
        raise ValueError(f"query {tuple(query.shape)} {query.dtype}, cache {tuple(cache.shape)} {cache.dtype}")
    if query.stride()[1:] != (size, 1) or cache.stride(3) != 1:
        raise ValueError("a head is not contiguous")
    if any(x.dtype != torch.int32 for x in (batch.block_table, batch.seq_lens, batch.query_start_loc)):
        raise ValueError("block table, lengths and starts are expected as int32")
