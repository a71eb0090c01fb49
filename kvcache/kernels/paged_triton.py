"""Top-k token selection and sparse decode attention over a paged KV cache on a GPU, with Triton kernels.

The cache is that of vLLM's Triton and FlashAttention backends, [num_blocks, num_kv_heads, block_size, 2 * head_size]:
K and then V in the last dimension, which is contiguous; the other dimensions may have any strides.

The device decides which requests of a batch are sparse (one query token, and a context beyond the budget), how long
they are, and which tokens they keep. No shape depends on these decisions and the host does not wait for them, so that
all kernels can be captured in a CUDA graph.

Selected tokens can be read in two ways:

- `shorten_block_table` writes a block table that contains the selected pages only. Keys are cached after rotary
  embedding, so any paged attention kernel, vLLM's included, attends to the selected pages through this table. All heads
  must share one selection.
- `paged_decode_attention` reads any selected tokens, with one selection per head group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton

from ..selection import PAGE_SIZE, SelectionRule
from . import programs_triton as kernels
from .launch import MIN_DOT_ROWS, SPLITS_AT_ONCE

if TYPE_CHECKING:
    from torch import Tensor

TILE = 128  # positions that a program processes at a time
TARGET_PROGRAMS = 2048  # number of programs that keeps a large GPU busy
MAX_SPLITS = 64  # parts into which a context is split
SCORE_BYTES = 64 << 20  # maximum size of the scores of a selection, and of their copies; larger batches are split
SCORES_LAUNCH = {"num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class DeviceBatch:
    """The requests of a step; the fields have the names of vLLM's attention metadata.

    Attributes:
        query_start_loc: [num_requests + 1] int32, index of the first query token of each request.
        seq_lens: [num_requests] int32, number of tokens up to a request's last query token, itself included.
        block_table: [num_requests, max_blocks] int32.
        max_seq_len: Upper bound of ``seq_lens``, known to the host.
    """

    query_start_loc: "Tensor"
    seq_lens: "Tensor"
    block_table: "Tensor"
    max_seq_len: int

    def is_sparse(self, rule: SelectionRule) -> "Tensor":
        """Return which requests decode one token with a context beyond the budget, [num_requests] bool."""
        one = self.query_start_loc[1:] - self.query_start_loc[:-1] == 1
        return one & (self.seq_lens > rule.longest_full_context)

    def parts(self, size: int) -> "Iterator[DeviceBatch]":
        """Split the batch into parts of at most ``size`` requests."""
        for i in range(0, len(self.seq_lens), size):
            part = slice(i, i + size)
            starts = self.query_start_loc[i : i + size + 1]
            yield DeviceBatch(starts, self.seq_lens[part], self.block_table[part], self.max_seq_len)


def token_scores(query: "Tensor", cache: "Tensor", batch: DeviceBatch, rule: SelectionRule, scale: float) -> "Tensor":
    """Compute the attention weight of each unit (page or token), aggregated over the heads of each head group.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query.
        batch: Requests of the step.
        rule: Selection rule.
        scale: Softmax scale.

    Returns:
        [num_requests, num_head_groups, num_units] float32, undefined for requests that are not sparse.

    Raises:
        ValueError: The kernels do not support a shape, stride or dtype.
    """
    _check(query, cache, batch)
    requests, (heads, head_size), kv_heads = len(batch.seq_lens), query.shape[1:], cache.shape[1]
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    inputs = query, cache, batch.block_table, batch.query_start_loc, batch.seq_lens
    strides = query.stride(0), *cache.stride()[:3], batch.block_table.stride(0)
    sizes = {
        "HEADS": heads,
        "NUM_QUERIES_PER_KV": heads // kv_heads,
        "ROWS": max(MIN_DOT_ROWS, triton.next_power_of_2(heads // kv_heads)),
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
        "BLOCK": cache.shape[2],
        "TILE": TILE,
    }
    tiles = triton.cdiv(batch.max_seq_len, TILE)
    splits = min(MAX_SPLITS, tiles, triton.cdiv(TARGET_PROGRAMS, requests * kv_heads))
    split_lse = torch.empty(requests, heads, splits, dtype=torch.float32, device=query.device)
    kernels.score_lse_kernel[(requests, kv_heads, splits)](
        *inputs, split_lse, scale, rule.longest_full_context, *strides, **sizes, **SCORES_LAUNCH
    )

    def weights(num_head_groups: int, unit: int) -> "Tensor":
        groups = min(num_head_groups, kv_heads)  # programs write the rows of all query heads of a KV head
        new = torch.zeros if rule.head_aggregation == "union" else torch.empty  # `union` takes a top-k over whole rows
        result = new(requests, num_head_groups, tiles * TILE // unit, dtype=torch.float32, device=query.device)
        programs = min(tiles, triton.cdiv(TARGET_PROGRAMS, requests * groups))
        kernels.unit_weights_kernel[(requests, groups, programs)](
            *inputs,
            split_lse,
            result,
            scale,
            rule.longest_full_context,
            result.shape[-1],
            splits,
            *strides,
            **sizes,
            UNIT=unit,
            KV_HEADS_PER_GROUP=kv_heads // groups,
            SPLITS_PADDED=triton.next_power_of_2(splits),
            PER_HEAD=num_head_groups == heads,
            TAKE_MAX=rule.head_aggregation == "max",
            **SCORES_LAUNCH,
        )
        return result

    if rule.head_aggregation != "union":
        return weights(rule.num_head_groups(heads, kv_heads), unit)
    per_head = weights(heads, 1)
    least = per_head.topk(min(rule.budget - rule.recent, per_head.shape[-1]), sorted=False).values.amin(-1)
    proposed = per_head.masked_fill(per_head < least[..., None], 0).sum(1, keepdim=True)
    return proposed.unflatten(-1, (-1, unit)).sum(-1)


def score_bytes(rule: SelectionRule, requests: int, heads: int, kv_heads: int, max_seq_len: int) -> int:
    """Return the size of the largest buffers of a selection: the scores of `token_scores`, and their ranked copy.

    Args:
        rule: Selection rule.
        requests: Number of requests of a step.
        heads: Number of query heads.
        kv_heads: Number of KV heads.
        max_seq_len: Longest context.
    """
    if rule.candidates:
        sizes = (rule.candidate_rule, max_seq_len), (replace(rule, candidates=0), min(rule.candidates, max_seq_len))
        return max(score_bytes(r, requests, heads, kv_heads, longest) for r, longest in sizes)
    per_token = rule.head_aggregation == "union" or rule.granularity == "token"
    groups = heads if rule.head_aggregation == "union" else rule.num_head_groups(heads, kv_heads)
    units = triton.cdiv(max_seq_len, TILE) * TILE // (1 if per_token else PAGE_SIZE)
    return 2 * 4 * requests * groups * units


def requests_at_once(rule: SelectionRule, heads: int, kv_heads: int, max_seq_len: int) -> int:
    """Return the number of requests whose scores take at most `SCORE_BYTES`, at least 1; see `score_bytes`."""
    return max(1, SCORE_BYTES // score_bytes(rule, 1, heads, kv_heads, max_seq_len))


def select_tokens(scores: "Tensor", batch: DeviceBatch, rule: SelectionRule) -> "Tensor":
    """Select the top units (pages or tokens) of each head group by their scores.

    Sinks, recent tokens and the current token are always selected.

    Args:
        scores: [num_requests, num_head_groups, num_units] float32, from `token_scores`.
        batch: Requests of the step.
        rule: Selection rule.

    Returns:
        [num_requests, num_head_groups, budget in units] int32 in ascending order, undefined for requests that are not
        sparse.
    """
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    units = scores.shape[-1]
    number = torch.arange(units, device=scores.device)
    context = batch.seq_lens[:, None, None]
    recent = (context - 1 - rule.recent).clamp_min(0) // unit
    always = (number < -(-rule.sinks // unit)) | (number >= recent)
    ranked = scores.masked_fill(always, float("inf")).masked_fill_(number * unit >= context, float("-inf"))
    selected = ranked.topk(min(rule.budget // unit, units), sorted=False).indices
    return selected.sort(-1).values.int()


def select_window(batch: DeviceBatch, rule: SelectionRule) -> "Tensor":
    """Select the first pages and the latest ones, for all heads.

    Args:
        batch: Requests of the step.
        rule: Window rule, see `SelectionRule.window`.

    Returns:
        [num_requests, 1, budget in pages] int32, as from `select_tokens`.
    """
    pages = torch.arange(-(-batch.max_seq_len // PAGE_SIZE), dtype=torch.float32, device=batch.seq_lens.device)
    return select_tokens(pages.repeat(len(batch.seq_lens), 1, 1), batch, rule)


def can_shorten_block_table(rule: SelectionRule, block_size: int) -> bool:
    """Return whether a shortened block table can express the selection: whole blocks, shared by all heads."""
    shared = rule.head_aggregation in ("sum", "max", "union")
    return shared and rule.granularity == "page" and PAGE_SIZE % block_size == 0


def shorten_block_table(
    kept: "Tensor", batch: DeviceBatch, rule: SelectionRule, block_size: int
) -> tuple["Tensor", "Tensor"]:
    """Return a block table and sequence lengths in which sparse requests have their selected pages only.

    Args:
        kept: [num_requests, 1, num_pages] int32, from `select_tokens`.
        batch: Requests of the step.
        rule: Selection rule, for which `can_shorten_block_table` is true.
        block_size: Number of tokens in a block.

    Returns:
        The block table [num_requests, max_blocks] int32, written up to the length of each request only, and the lengths
        [num_requests] int32.
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
        rule.longest_full_context,
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
    """Compute the attention of sparse requests over their selected tokens, and write their rows of ``output``.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query.
        batch: Requests of the step.
        rule: Selection rule.
        scale: Softmax scale.
        output: [num_tokens, num_heads, head_size], heads contiguous.
        kept: [num_requests, num_head_groups, num_units] int32, from `select_tokens`.

    Raises:
        ValueError: The kernels do not support a shape, stride or dtype.
    """
    _check(query, cache, batch)
    requests, (heads, head_size), kv_heads = len(batch.seq_lens), query.shape[1:], cache.shape[1]
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    num_head_groups, units = kept.shape[1:]
    count = triton.cdiv(units * unit, TILE)
    together = 1 if num_head_groups == heads else heads // kv_heads
    workspace: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    parts = torch.empty(requests, heads, count, head_size, **workspace)
    tops, totals = torch.empty(2, requests, heads, count, **workspace)
    sizes = {"HEADS": heads, "HEAD_SIZE": head_size, "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size)}
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
        rule.longest_full_context,
        units,
        query.stride(0),
        *cache.stride()[:3],
        batch.block_table.stride(0),
        **sizes,
        NUM_QUERIES_PER_KV=heads // kv_heads,
        TOGETHER=together,
        ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(together)),
        NUM_HEAD_GROUPS=num_head_groups,
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
        rule.longest_full_context,
        count,
        output.stride(0),
        **sizes,
        SPLITS_AT_ONCE=SPLITS_AT_ONCE,
    )


def _check(query: "Tensor", cache: "Tensor", batch: DeviceBatch) -> None:
    """Check shapes, strides and dtypes.

    Raises:
        ValueError: The kernels do not support one of them.
    """
    head_size = query.shape[-1]
    if cache.shape[3] != 2 * head_size or query.shape[1] % cache.shape[1] or cache.dtype != query.dtype:
        raise ValueError(
            f"unsupported query {tuple(query.shape)} {query.dtype}, cache {tuple(cache.shape)} {cache.dtype}"
        )
    if query.stride()[1:] != (head_size, 1) or cache.stride(3) != 1:
        raise ValueError("the heads of query or cache are not contiguous")
    if any(x.dtype != torch.int32 for x in (batch.block_table, batch.seq_lens, batch.query_start_loc)):
        raise ValueError("block_table, seq_lens and query_start_loc: expected int32")
