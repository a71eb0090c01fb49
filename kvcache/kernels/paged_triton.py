"""Choosing and reading positions of a paged KV cache on a GPU, as Triton kernels.

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
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

from ..selection import GROUP, Rule

if TYPE_CHECKING:
    from torch import Tensor

jit = cast(Any, triton.jit)
TILE = 128  # positions that a program looks at together
SPLIT = 1024  # positions of one program of `_unit_scores`
LEAST_ROWS = 16  # of a matrix product on tensor cores


@dataclass(frozen=True)
class Batch:
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

    def is_sparse(self, rule: Rule) -> "Tensor":
        """[requests] bool: which requests decode one token beyond the budget."""
        one = self.query_start_loc[1:] - self.query_start_loc[:-1] == 1
        return one & (self.seq_lens > rule.budget)


@jit
def _is_sparse(starts, seq_lens, request, budget):
    """(first query row, context, whether the request decodes one token beyond the budget)."""
    row = tl.load(starts + request)
    context = tl.load(seq_lens + request)
    return row, context, (tl.load(starts + request + 1) - row == 1) & (context > budget)


@jit
def _unit_scores(
    query,
    cache,
    table,
    starts,
    seq_lens,
    scores,
    scale,
    budget,
    units,
    query_stride,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    HEADS: tl.constexpr,  # query heads
    SHARE: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # SHARE, padded
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Log-sum-exp of the scaled scores of every unit, scores [requests, heads, units]; units beyond a context: -inf."""
    request, kv_head = tl.program_id(0), tl.program_id(1)
    row, context, sparse = _is_sparse(starts, seq_lens, request, budget)
    if sparse:
        g, d = tl.arange(0, ROWS), tl.arange(0, SIZE_PADDED)
        head = kv_head * SHARE + g
        q = tl.load(
            query + row.to(tl.int64) * query_stride + head[:, None] * SIZE + d[None, :],
            mask=(g < SHARE)[:, None] & (d < SIZE)[None, :],
            other=0.0,
        )
        begin = tl.program_id(2) * SPLIT
        for tile in range(begin, min(begin + SPLIT, units * UNIT), TILE):
            position = tile + tl.arange(0, TILE)
            inside = position < context
            block = tl.load(table + request * table_stride + position // BLOCK, mask=inside, other=0).to(tl.int64)
            at = block * block_stride + kv_head * head_stride + (position % BLOCK) * token_stride
            k = tl.load(cache + at[:, None] + d[None, :], mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            x = tl.where(inside[None, :], x, -float("inf"))
            if UNIT == 1:
                unit = position
                value = x
            else:
                unit = tile // UNIT + tl.arange(0, TILE // UNIT)
                x = tl.reshape(x, (ROWS, TILE // UNIT, UNIT))
                top = tl.max(x, 2)
                some = tl.where(top == -float("inf"), 0.0, top)
                value = some + tl.log(tl.sum(tl.exp(x - some[:, :, None]), 2))
            to = scores + (request.to(tl.int64) * HEADS + head[:, None]) * units + unit[None, :]
            tl.store(to, value, mask=(g < SHARE)[:, None] & (unit < units)[None, :])


@jit
def _importance(
    scores,
    totals,
    least,
    starts,
    seq_lens,
    result,
    budget,
    units,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of each unit: a softmax for each head, summed (or its maximum) over the heads of a set."""
    request, chosen_by = tl.program_id(0), tl.program_id(1)
    _, _, sparse = _is_sparse(starts, seq_lens, request, budget)
    if sparse:
        unit = tl.program_id(2) * TILE + tl.arange(0, TILE)
        found = tl.zeros([TILE], tl.float32)
        for i in range(HEADS // SETS):
            head = request.to(tl.int64) * HEADS + chosen_by * (HEADS // SETS) + i
            x = tl.load(scores + head * units + unit, mask=unit < units, other=-float("inf"))
            p = tl.exp(x - tl.load(totals + head))
            p = tl.where(x >= tl.load(least + head), p, 0.0)
            found = tl.maximum(found, p) if TAKE_MAX else found + p
        tl.store(result + (request.to(tl.int64) * SETS + chosen_by) * units + unit, found, mask=unit < units)


@jit
def _shorten(
    table,
    kept,
    starts,
    seq_lens,
    short_table,
    short_lens,
    budget,
    pages,
    table_stride,
    short_stride,
    PAGE_BLOCKS: tl.constexpr,  # blocks of a page
    PAGE: tl.constexpr,  # positions of a page
    TILE: tl.constexpr,
):
    """Copy a request's block table, of sparse requests the blocks of kept pages only; and its length."""
    request = tl.program_id(0)
    _, context, sparse = _is_sparse(starts, seq_lens, request, budget)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    length = context
    source = slot
    if sparse:
        page = tl.load(kept + request * pages + slot // PAGE_BLOCKS, mask=slot // PAGE_BLOCKS < pages, other=0)
        source = page * PAGE_BLOCKS + slot % PAGE_BLOCKS
        last = tl.load(kept + request * pages + pages - 1)
        length = (pages - 1) * PAGE + context - last * PAGE
    inside = slot * (PAGE // PAGE_BLOCKS) < length
    tl.store(
        short_table + request * short_stride + slot,
        tl.load(table + request * table_stride + source, mask=inside, other=0),
        mask=inside,
    )
    if tl.program_id(1) == 0:
        tl.store(short_lens + request, length)


@jit
def _decode_part(
    query,
    cache,
    table,
    starts,
    seq_lens,
    kept,
    parts,
    tops,
    totals,
    scale,
    budget,
    units,
    query_stride,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    TOGETHER: tl.constexpr,  # query heads of a program: SHARE, or 1 when each has its own choice
    ROWS: tl.constexpr,  # TOGETHER, padded
    SETS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention over one tile of the positions that a request kept; parts are merged by `_decode_merge`."""
    request, program, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, context, sparse = _is_sparse(starts, seq_lens, request, budget)
    if sparse:
        first = program * TOGETHER
        kv_head = first // SHARE
        g, d = tl.arange(0, ROWS), tl.arange(0, SIZE_PADDED)
        q = tl.load(
            query + row.to(tl.int64) * query_stride + (first + g)[:, None] * SIZE + d[None, :],
            mask=(g < TOGETHER)[:, None] & (d < SIZE)[None, :],
            other=0.0,
        )
        slot = part * TILE + tl.arange(0, TILE)
        chosen_by = first * SETS // HEADS
        unit = tl.load(kept + (request * SETS + chosen_by) * units + slot // UNIT, mask=slot // UNIT < units, other=0)
        position = unit * UNIT + slot % UNIT
        inside = (slot // UNIT < units) & (position < context)
        block = tl.load(table + request * table_stride + position // BLOCK, mask=inside, other=0).to(tl.int64)
        at = block * block_stride + kv_head * head_stride + (position % BLOCK) * token_stride
        there = inside[:, None] & (d < SIZE)[None, :]
        k = tl.load(cache + at[:, None] + d[None, :], mask=there, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        x = tl.where(inside[None, :], x, -float("inf"))
        top = tl.max(x, 1)
        some = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp(x - some[:, None])
        v = tl.load(cache + at[:, None] + SIZE + d[None, :], mask=there, other=0.0)
        mixed = tl.dot(p.to(v.dtype), v, input_precision="ieee").to(tl.float32)
        to = (request.to(tl.int64) * HEADS + first + g) * tl.num_programs(2) + part
        mine = g < TOGETHER
        tl.store(parts + to[:, None] * SIZE + d[None, :], mixed, mask=mine[:, None] & (d < SIZE)[None, :])
        tl.store(tops + to, top, mask=mine)
        tl.store(totals + to, tl.sum(p, 1), mask=mine)


@jit
def _decode_merge(
    parts,
    tops,
    totals,
    starts,
    seq_lens,
    output,
    budget,
    count,
    output_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """Merge a head's parts by log-sum-exp, in their order."""
    request, head = tl.program_id(0), tl.program_id(1)
    row, _, sparse = _is_sparse(starts, seq_lens, request, budget)
    if sparse:
        d = tl.arange(0, SIZE_PADDED)
        base = (request.to(tl.int64) * HEADS + head) * count
        top = -float("inf")
        for i in range(count):
            top = tl.maximum(top, tl.load(tops + base + i))
        total = 0.0
        mixed = tl.zeros([SIZE_PADDED], tl.float32)
        for i in range(count):
            weight = tl.exp(tl.load(tops + base + i) - top)
            total += weight * tl.load(totals + base + i)
            mixed += weight * tl.load(parts + (base + i) * SIZE + d, mask=d < SIZE, other=0.0)
        to = output + row.to(tl.int64) * output_stride + head * SIZE + d
        tl.store(to, (mixed / total).to(output.dtype.element_ty), mask=d < SIZE)


# --------------------------------------------------------------------------------------------- for torch


def importance(query: "Tensor", cache: "Tensor", batch: Batch, rule: Rule, scale: float) -> "Tensor":
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
    unit = GROUP if by_page and rule.aggregate in ("head", "kv_head", "sum") else 1
    units = -(-batch.max_seq_len // GROUP) * GROUP // unit
    scores = torch.full((requests, heads, units), float("-inf"), dtype=torch.float32, device=query.device)
    share = heads // kv_heads
    _unit_scores[(requests, kv_heads, triton.cdiv(units * unit, SPLIT))](
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
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(share)),
        SIZE=size,
        SIZE_PADDED=triton.next_power_of_2(size),
        BLOCK=cache.shape[2],
        UNIT=unit,
        TILE=TILE,
        SPLIT=SPLIT,
    )
    totals = scores.logsumexp(-1)
    least = torch.full_like(totals, float("-inf"))
    if rule.aggregate == "union":
        least = scores.topk(min(rule.budget - rule.recent, units), sorted=False).values.amin(-1)
    sets = rule.sets(heads, kv_heads)
    result = torch.empty(requests, sets, units, dtype=torch.float32, device=query.device)
    _importance[(requests, sets, triton.cdiv(units, TILE))](
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
        TAKE_MAX=rule.aggregate == "max",
        TILE=TILE,
    )
    if by_page and unit == 1:
        result = result.view(requests, sets, units // GROUP, GROUP).sum(-1)
    return result


def choose(scores: "Tensor", batch: Batch, rule: Rule) -> "Tensor":
    """The units that ``rule`` keeps by the ``scores`` of `importance`.

    Sinks, recent positions and the current one are always among them.

    Returns:
        [requests, sets, budget in units] int32, ascending; what stands there for other requests means nothing.
    """
    unit = GROUP if rule.granularity == "page" else 1
    units = scores.shape[-1]
    number = torch.arange(units, device=scores.device)
    context = batch.seq_lens[:, None, None]
    recent = (context - 1 - rule.recent).clamp_min(0) // unit
    always = (number < -(-rule.sinks // unit)) | (number >= recent)
    ranked = scores.masked_fill(always, float("inf")).masked_fill(number * unit >= context, float("-inf"))
    kept = ranked.topk(min(rule.budget // unit, units), sorted=False).indices
    return kept.sort(-1).values.int()


def can_shorten(rule: Rule, block_size: int) -> bool:
    """Whether a shortened block table can express what ``rule`` keeps: whole blocks that all heads share."""
    shared = rule.aggregate in ("sum", "max", "union")
    return shared and rule.granularity == "page" and GROUP % block_size == 0


def shorten(kept: "Tensor", batch: Batch, rule: Rule, block_size: int) -> tuple["Tensor", "Tensor"]:
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
    _shorten[(requests, triton.cdiv(blocks, TILE))](
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
        PAGE_BLOCKS=GROUP // block_size,
        PAGE=GROUP,
        TILE=TILE,
    )
    return table, lens


def decode(
    query: "Tensor",
    cache: "Tensor",
    batch: Batch,
    rule: Rule,
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
    unit = GROUP if rule.granularity == "page" else 1
    sets, units = kept.shape[1:]
    count = triton.cdiv(units * unit, TILE)
    together = 1 if sets == heads else heads // kv_heads
    workspace: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    parts = torch.empty(requests, heads, count, size, **workspace)
    tops, totals = torch.empty(2, requests, heads, count, **workspace)
    sizes = {"HEADS": heads, "SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size)}
    _decode_part[(requests, heads // together, count)](
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
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(together)),
        SETS=sets,
        BLOCK=cache.shape[2],
        UNIT=unit,
        TILE=TILE,
    )
    _decode_merge[(requests, heads)](
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


def _check(query: "Tensor", cache: "Tensor", batch: Batch) -> None:
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
