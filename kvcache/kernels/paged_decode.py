"""Decode attention over a paged cache, whole or at chosen positions, and the choice: `paged_decode.cpp` for torch.

The cache is that of vLLM's "vec" CPU kernels: [blocks, kv_heads, block_size, 2 * head_size], in each head's part K
transposed [head_size, block_size] and then V [block_size, head_size]. Types: float32, bfloat16, float16.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish._internal import cpp_build

from ..selection import PAGE_SIZE, SelectionRule

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
AGGREGATES = {"head": 0, "kv_head": 0, "sum": 0, "max": 1, "union": 2}  # enum Aggregate


class HeadView(Structure):
    """Where the keys and values of a KV head are; `attend.hpp`."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("windowed", c_int32),
    )


class CacheView(Structure):
    """The heads of a layer; `attend.hpp`."""

    _fields_ = (("heads", POINTER(HeadView)), ("kv_heads", c_int32), ("block_size", c_int32), ("head_size", c_int32))


class _DecodeBatch(Structure):
    _fields_ = (
        ("count", c_int32),
        ("query_heads", c_int32),
        ("request", c_void_p),
        ("token", c_void_p),
        ("context", c_void_p),
    )


class PromptSpans(Structure):
    """Stretches of consecutive query tokens; `prompt.hpp`."""

    _fields_ = (
        ("count", c_int32),
        ("query_heads", c_int32),
        ("request", c_void_p),
        ("token", c_void_p),
        ("context", c_void_p),
        ("length", c_void_p),
        ("seen", c_void_p),
        ("first_seen", c_void_p),
    )


class _SelectedTokens(Structure):
    _fields_ = (
        ("sets", c_int32),
        ("capacity", c_int32),
        ("groups", c_void_p),
        ("masks", c_void_p),
        ("sizes", c_void_p),
    )


class _SelectionRule(Structure):
    _fields_ = tuple((name, c_int32) for name in ("sets", "aggregate", "budget", "sinks", "recent", "by_page"))


@functools.cache
def load_paged_decode_library() -> ctypes.CDLL:
    """The compiled kernels, with their signatures.

    Raises:
        NoCompiler: they are not in the cache, and nothing can compile them.
    """
    lib = cpp_build.load("paged_decode", Path(__file__).parent)
    cache, rows, choice, rule = (
        POINTER(CacheView),
        POINTER(_DecodeBatch),
        POINTER(_SelectedTokens),
        POINTER(_SelectionRule),
    )
    where = (c_void_p, c_int64)
    lib.pilotfish_decode.argtypes = (c_int, cache, rows, choice, c_float, *where, *where, *where, c_int)
    lib.pilotfish_decode.restype = c_int
    lib.pilotfish_importance.argtypes = (rows, rule, c_void_p, *where, c_int)
    lib.pilotfish_importance.restype = None
    lib.pilotfish_choose.argtypes = (rows, rule, *where, choice, c_int)
    lib.pilotfish_choose.restype = None
    return lib


class DecodeBatch:
    """The query tokens of a step that are decoded by these kernels."""

    def __init__(self, request: Sequence[int], token: Sequence[int], context: Sequence[int], query_heads: int) -> None:
        """Gather them.

        Args:
            request: [count] their rows in the block table.
            token: [count] their rows in query and output.
            context: [count] positions before and at each, at least 1.
            query_heads: Number of query heads.
        """
        import torch

        self.count, self.query_heads = len(request), query_heads
        self.request = list(request)
        self.context, self.longest = list(context), max(context)
        self._numbers = torch.tensor([request, token, context], dtype=torch.int32)
        pointers = [row.data_ptr() for row in self._numbers]
        self.struct = _DecodeBatch(self.count, query_heads, *pointers)

    @property
    def padded(self) -> int:
        """Length of a row of scores: the longest context in whole groups."""
        return -(-self.longest // PAGE_SIZE) * PAGE_SIZE


@dataclass
class SelectedTokens:
    """Chosen positions, as groups of `GROUP` and a bit mask for each.

    Attributes:
        pages: [rows, sets, capacity] int32, group numbers in ascending order.
        masks: [rows, sets, capacity] int32 (its 32 bits), bit t for the group's token t.
        num_pages: [rows, sets] int32, groups in use.
    """

    pages: "Tensor"
    masks: "Tensor"
    num_pages: "Tensor"

    def positions(self, row: int, chosen: int = 0) -> list[int]:
        """The positions of one row and set, ascending; a last page may reach beyond the context."""
        size = int(self.num_pages[row, chosen])
        pairs = zip(self.pages[row, chosen, :size].tolist(), self.masks[row, chosen, :size].tolist(), strict=True)
        return [group * PAGE_SIZE + bit for group, mask in pairs for bit in range(PAGE_SIZE) if mask >> bit & 1]

    def struct(self) -> _SelectedTokens:
        pointers = (self.pages.data_ptr(), self.masks.data_ptr(), self.num_pages.data_ptr())
        return _SelectedTokens(self.pages.shape[1], self.pages.shape[2], *pointers)


def checked_cache_view(query: "Tensor", cache: "Tensor", block_table: "Tensor", output: "Tensor") -> CacheView:
    """The cache of a layer as the kernels read it; it must outlive what is returned.

    Args:
        query: [tokens, query_heads, head_size], heads contiguous.
        cache: [blocks, kv_heads, block_size, 2 * head_size] in the type of the query.
        block_table: [requests, blocks] int32.
        output: As ``query``.

    Raises:
        ValueError: shapes or types that the kernels do not read.
    """
    import torch

    size = query.shape[-1]
    if str(query.dtype) not in DTYPES or cache.dtype != query.dtype or output.dtype != query.dtype:
        raise ValueError(f"query {query.dtype}, cache {cache.dtype}, output {output.dtype}")
    if size % 16 or cache.shape[3] != 2 * size or cache.shape[2] % PAGE_SIZE or query.shape[1] % cache.shape[1]:
        raise ValueError(f"query {tuple(query.shape)}, cache {tuple(cache.shape)}")
    if query.stride()[1:] != (size, 1) or output.stride()[1:] != (size, 1) or cache.stride()[2:] != (2 * size, 1):
        raise ValueError("a head is not contiguous")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(f"block table of {block_table.dtype}")
    return cache_view(cache, block_table.data_ptr(), block_table.stride(0))


def cache_view(cache: "Tensor", table: "int | None" = None, table_stride: int = 0) -> CacheView:
    """A cache as the kernels read it, unchecked; without a table of blocks for those that take slots."""
    blocks = (cache.stride(0), table, table_stride, 0)
    step = cache.stride(1) * cache.element_size()
    heads = (HeadView * cache.shape[1])(*((cache.data_ptr() + h * step, *blocks) for h in range(cache.shape[1])))
    return CacheView(heads, cache.shape[1], cache.shape[2], cache.shape[3] // 2)


_ALL_TOKENS = _SelectedTokens(0, 0, None, None, None)


def paged_decode_attention(
    query: "Tensor",
    cache: "Tensor",
    block_table: "Tensor",
    rows: DecodeBatch,
    scale: float,
    output: "Tensor",
    choice: SelectedTokens | None = None,
    logits: "Tensor | None" = None,
) -> None:
    """Attention of one query token per row; writes the rows' part of ``output``.

    Args:
        query: [tokens, query_heads, head_size], heads contiguous.
        cache: [blocks, kv_heads, block_size, 2 * head_size] in the type of the query; see the module.
        block_table: [requests, blocks] int32.
        rows: Which tokens.
        scale: Of the scores.
        output: As ``query``.
        choice: The positions to read; None for all.
        logits: [rows, query_heads, >= context] float32 that takes the scaled scores.

    Raises:
        ValueError: as `view`.
    """
    import torch

    paged = checked_cache_view(query, cache, block_table, output)
    load_paged_decode_library().pilotfish_decode(
        DTYPES[str(query.dtype)],
        byref(paged),
        byref(rows.struct),
        byref(_ALL_TOKENS if choice is None else choice.struct()),
        scale,
        query.data_ptr(),
        query.stride(0),
        output.data_ptr(),
        output.stride(0),
        None if logits is None else logits.data_ptr(),
        0 if logits is None else logits.shape[2],
        torch.get_num_threads(),
    )


def token_scores(rows: DecodeBatch, rule: SelectionRule, kv_heads: int, logits: "Tensor") -> "Tensor":
    """How much each position matters to each set of heads: [rows, sets, padded] float32; ``logits`` are overwritten."""
    import torch

    sets = rule.num_head_groups(rows.query_heads, kv_heads)
    result = torch.empty(rows.count, sets, logits.shape[2])
    load_paged_decode_library().pilotfish_importance(
        byref(rows.struct),
        byref(_rule_struct(rule, sets)),
        logits.data_ptr(),
        result.data_ptr(),
        logits.shape[2],
        torch.get_num_threads(),
    )
    return result


def select_tokens(rows: DecodeBatch, rule: SelectionRule, scores: "Tensor") -> SelectedTokens:
    """The positions that ``rule`` keeps by the ``scores`` of `importance`."""
    import torch

    sets = scores.shape[1]
    units = rule.budget if rule.granularity == "token" else rule.budget // PAGE_SIZE
    shape = (rows.count, sets, min(max(units, 1), rows.padded // PAGE_SIZE))
    choice = SelectedTokens(
        torch.empty(shape, dtype=torch.int32),
        torch.empty(shape, dtype=torch.int32),
        torch.empty(shape[:2], dtype=torch.int32),
    )
    load_paged_decode_library().pilotfish_choose(
        byref(rows.struct),
        byref(_rule_struct(rule, sets)),
        scores.data_ptr(),
        scores.shape[2],
        byref(choice.struct()),
        torch.get_num_threads(),
    )
    return choice


def _rule_struct(rule: SelectionRule, sets: int) -> _SelectionRule:
    by_page = rule.granularity == "page"
    return _SelectionRule(sets, AGGREGATES[rule.head_aggregation], rule.budget, rule.sinks, rule.recent, by_page)
