"""Decode attention over a paged KV cache, full or sparse, and top-k token selection: `paged_decode.cpp` for torch.

The cache has the layout of vLLM's "vec" CPU kernels, [num_blocks, num_kv_heads, block_size, 2 * head_size]. The part of
a head holds K transposed, [head_size, block_size], and then V, [block_size, head_size]. The dtype is float32, bfloat16
or float16.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish._internal import cpp_build

from ..selection import PAGE_SIZE, SelectionRule

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
AGGREGATES = {"head": 0, "kv_head": 0, "sum": 0, "max": 1, "union": 2}  # enum Aggregate


class HeadView(Structure):
    """The cache and block table of one KV head: `Head` in `attend.hpp`."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("windowed", c_int32),
    )


class CacheView(Structure):
    """The KV cache of one layer: `Cache` in `attend.hpp`."""

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
    """Spans of consecutive query tokens: `Prompts` in `prompt.hpp`."""

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
        ("num_head_groups", c_int32),
        ("capacity", c_int32),
        ("groups", c_void_p),
        ("masks", c_void_p),
        ("sizes", c_void_p),
    )


class _Logits(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("pages", _SelectedTokens))


class _SelectionRule(Structure):
    _fields_ = tuple(
        (name, c_int32) for name in ("num_head_groups", "aggregate", "budget", "sinks", "recent", "by_page")
    )


@functools.cache
def load_paged_decode_library() -> ctypes.CDLL:
    """Load the compiled kernels, and declare their signatures.

    Raises:
        NoCompiler: The kernels are not in the user's cache, and there is no C++ compiler.
    """
    lib = cpp_build.load("paged_decode", Path(__file__).parent)
    cache, rows, choice, rule = (
        POINTER(CacheView),
        POINTER(_DecodeBatch),
        POINTER(_SelectedTokens),
        POINTER(_SelectionRule),
    )
    strided = (c_void_p, c_int64)
    lib.pilotfish_decode.argtypes = (
        *(c_int, cache, rows, choice, c_float, *strided, *strided),
        *(POINTER(_Logits), c_int),
    )
    lib.pilotfish_decode.restype = c_int
    lib.pilotfish_token_scores.argtypes = (rows, rule, c_void_p, *strided, c_int)
    lib.pilotfish_token_scores.restype = None
    lib.pilotfish_select_tokens.argtypes = (rows, rule, *strided, choice, c_int, c_int)
    lib.pilotfish_select_tokens.restype = None
    return lib


class DecodeBatch:
    """The query tokens of a decode step, one or more per request."""

    def __init__(self, request: Sequence[int], token: Sequence[int], context: Sequence[int], query_heads: int) -> None:
        """Describe the query tokens.

        Args:
            request: [count] row of each query token in the block table.
            token: [count] row of each query token in query and output.
            context: [count] number of tokens that each query token attends to, itself included; at least 1.
            query_heads: Number of query heads.
        """
        import torch

        self.count, self.query_heads = len(request), query_heads
        self.request, self.token = list(request), list(token)
        self.context, self.longest = list(context), max(context)
        self._numbers = torch.tensor([request, token, context], dtype=torch.int32)
        pointers = [row.data_ptr() for row in self._numbers]
        self.struct = _DecodeBatch(self.count, query_heads, *pointers)

    @property
    def padded(self) -> int:
        """Length of a row of scores: the longest context, rounded up to whole pages."""
        return -(-self.longest // PAGE_SIZE) * PAGE_SIZE

    def parts(self, max_bytes: int, logits: int | None = None) -> "Iterator[DecodeBatch]":
        """Split the batch so that the logits of each part take at most ``max_bytes``, or belong to one query token.

        Args:
            max_bytes: Maximum size of the logits of a part.
            logits: Number of logits of a head; the padded context length if not given.
        """
        step = max(1, max_bytes // (4 * self.query_heads * (logits or self.padded)))
        for i in range(0, self.count, step):
            part = slice(i, i + step)
            yield DecodeBatch(self.request[part], self.token[part], self.context[part], self.query_heads)


@dataclass
class SelectedTokens:
    """The selected tokens of a decode batch, as pages of `PAGE_SIZE` tokens and a bit mask for each page.

    Attributes:
        pages: [count, num_head_groups, capacity] int32, page indices in ascending order.
        masks: [count, num_head_groups, capacity] int32, of which bit t is set if token t of the page is selected.
        num_pages: [count, num_head_groups] int32, number of pages in use.
    """

    pages: "Tensor"
    masks: "Tensor"
    num_pages: "Tensor"

    def positions(self, row: int, chosen: int = 0) -> list[int]:
        """Return the selected positions of one query token, in ascending order.

        The last page may reach beyond the context.

        Args:
            row: Index of the query token in the batch.
            chosen: Index of the head group.
        """
        count = int(self.num_pages[row, chosen])
        pairs = zip(self.pages[row, chosen, :count].tolist(), self.masks[row, chosen, :count].tolist(), strict=True)
        return [page * PAGE_SIZE + bit for page, mask in pairs for bit in range(PAGE_SIZE) if mask >> bit & 1]

    @staticmethod
    def cat(parts: "Sequence[SelectedTokens]") -> "SelectedTokens":
        """Concatenate the selections of the parts of a batch."""
        import torch
        from torch.nn.functional import pad

        if len(parts) == 1:
            return parts[0]
        capacity = max(part.pages.shape[2] for part in parts)
        pages, masks = (
            torch.cat([pad(values, (0, capacity - values.shape[2])) for values in each])
            for each in zip(*((part.pages, part.masks) for part in parts), strict=True)
        )
        return SelectedTokens(pages, masks, torch.cat([part.num_pages for part in parts]))

    def struct(self) -> _SelectedTokens:
        pointers = (self.pages.data_ptr(), self.masks.data_ptr(), self.num_pages.data_ptr())
        return _SelectedTokens(self.pages.shape[1], self.pages.shape[2], *pointers)


def checked_cache_view(query: "Tensor", cache: "Tensor", block_table: "Tensor", output: "Tensor") -> CacheView:
    """Check the arguments of a kernel, and return the struct that describes the cache.

    The struct holds pointers: ``cache`` and ``block_table`` must outlive it.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query.
        block_table: [num_requests, max_blocks] int32.
        output: [num_tokens, num_heads, head_size], heads contiguous, in the dtype of the query.

    Raises:
        ValueError: The kernels do not support a shape, stride or dtype.
    """
    import torch

    head_size = query.shape[-1]
    if str(query.dtype) not in DTYPES or cache.dtype != query.dtype or output.dtype != query.dtype:
        raise ValueError(f"unsupported dtypes: query {query.dtype}, cache {cache.dtype}, output {output.dtype}")
    if (
        head_size % 16
        or cache.shape[3] != 2 * head_size
        or cache.shape[2] % PAGE_SIZE
        or query.shape[1] % cache.shape[1]
    ):
        raise ValueError(f"unsupported shapes: query {tuple(query.shape)}, cache {tuple(cache.shape)}")
    if (
        query.stride()[1:] != (head_size, 1)
        or output.stride()[1:] != (head_size, 1)
        or cache.stride()[2:] != (2 * head_size, 1)
    ):
        raise ValueError("the heads of query, cache or output are not contiguous")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(f"block table of {block_table.dtype}, expected int32 with contiguous rows")
    return cache_view(cache, block_table.data_ptr(), block_table.stride(0))


def cache_view(cache: "Tensor", table: "int | None" = None, table_stride: int = 0) -> CacheView:
    """Return the struct that describes a cache, without checks.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        table: Address of the block table; not given for kernels that take slots.
        table_stride: Stride of a row of the block table, in elements.
    """
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
    output: "Tensor | None",
    choice: SelectedTokens | None = None,
    logits: "Tensor | None" = None,
    candidates: SelectedTokens | None = None,
) -> None:
    """Compute the attention of a decode batch, and write the rows of its query tokens in ``output``.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query; see the module.
        block_table: [num_requests, max_blocks] int32.
        rows: Query tokens of the batch.
        scale: Softmax scale.
        output: [num_tokens, num_heads, head_size], heads contiguous, in the dtype of the query; None if only logits are
            needed, for which no values are read.
        choice: Selected tokens to attend to; all tokens if not given.
        logits: [count, num_heads, >= longest context] float32, to which the scaled query-key products are written.
        candidates: Whole pages, the same for all heads; the logits of these pages only are written, without gaps, and
            may be as short.

    Raises:
        ValueError: The kernels do not support a shape, stride or dtype; see `checked_cache_view`.
    """
    import torch

    paged = checked_cache_view(query, cache, block_table, query if output is None else output)
    load_paged_decode_library().pilotfish_decode(
        DTYPES[str(query.dtype)],
        byref(paged),
        byref(rows.struct),
        byref(_ALL_TOKENS if choice is None else choice.struct()),
        scale,
        query.data_ptr(),
        query.stride(0),
        None if output is None else output.data_ptr(),
        0 if output is None else output.stride(0),
        byref(
            _Logits(
                None if logits is None else logits.data_ptr(),
                0 if logits is None else logits.shape[2],
                _ALL_TOKENS if candidates is None else candidates.struct(),
            )
        ),
        torch.get_num_threads(),
    )


def token_scores(rows: DecodeBatch, rule: SelectionRule, kv_heads: int, logits: "Tensor") -> "Tensor":
    """Compute the attention weight of each token, aggregated over the heads of each head group.

    Args:
        rows: Query tokens of the batch.
        rule: Selection rule.
        kv_heads: Number of KV heads.
        logits: [count, num_heads, padded] scaled query-key products from `paged_decode_attention`; overwritten.

    Returns:
        [count, num_head_groups, padded] float32.
    """
    import torch

    num_head_groups = rule.num_head_groups(rows.query_heads, kv_heads)
    result = torch.empty(rows.count, num_head_groups, logits.shape[2])
    load_paged_decode_library().pilotfish_token_scores(
        byref(rows.struct),
        byref(_rule_struct(rule, num_head_groups)),
        logits.data_ptr(),
        result.data_ptr(),
        logits.shape[2],
        torch.get_num_threads(),
    )
    return result


def select_tokens(rows: DecodeBatch, rule: SelectionRule, scores: "Tensor", per_unit: bool = False) -> SelectedTokens:
    """Select the top tokens or pages of each head group by their scores.

    Args:
        rows: Query tokens of the batch.
        rule: Selection rule.
        scores: [count, num_head_groups, n] float32. n is the padded number of tokens, or of units if ``per_unit``.
        per_unit: Whether there is one score per unit (page or token, by ``rule.granularity``) instead of one per token.
    """
    import torch

    num_head_groups = scores.shape[1]
    units = rule.budget if rule.granularity == "token" else rule.budget // PAGE_SIZE
    shape = (rows.count, num_head_groups, min(max(units, 1), rows.padded // PAGE_SIZE))
    choice = SelectedTokens(
        torch.empty(shape, dtype=torch.int32),
        torch.empty(shape, dtype=torch.int32),
        torch.empty(shape[:2], dtype=torch.int32),
    )
    load_paged_decode_library().pilotfish_select_tokens(
        byref(rows.struct),
        byref(_rule_struct(rule, num_head_groups)),
        scores.data_ptr(),
        scores.shape[2],
        byref(choice.struct()),
        per_unit,
        torch.get_num_threads(),
    )
    return choice


def select_among(
    candidates: SelectedTokens,
    rows: DecodeBatch,
    rule: SelectionRule,
    kv_heads: int,
    logits: "Tensor",
    reduce: "Callable[[Tensor, SelectionRule], None] | None" = None,
) -> SelectedTokens:
    """Select the top tokens or pages of each head group among candidates, as if the context had no other tokens.

    Args:
        candidates: Whole pages of each query token for all heads, sinks and recent tokens included.
        rows: Query tokens of the batch.
        rule: Selection rule.
        kv_heads: Number of KV heads.
        logits: [count, num_heads, pages * 32] result of `paged_decode_attention` for the candidates; overwritten.
        reduce: Function that reduces scores over tensor-parallel ranks in place.

    Returns:
        The selected tokens of each query token and head group.
    """
    # The last page of the candidates is that of the current token.
    lengths = [
        count * PAGE_SIZE - -context % PAGE_SIZE
        for count, context in zip(candidates.num_pages[:, 0].tolist(), rows.context, strict=True)
    ]
    compact = DecodeBatch(rows.request, rows.token, lengths, rows.query_heads)
    scores = token_scores(compact, rule, kv_heads, logits)
    if reduce is not None:
        reduce(scores, rule)
    selected = select_tokens(compact, rule, scores)
    numbers = selected.pages.long().clamp(0, candidates.pages.shape[2] - 1)  # undefined beyond the selected pages
    return replace(selected, pages=candidates.pages.expand(-1, numbers.shape[1], -1).gather(2, numbers))


def select_window(rows: DecodeBatch, rule: SelectionRule) -> SelectedTokens:
    """Select the first pages and the latest ones, for all heads.

    Args:
        rows: Query tokens of the batch.
        rule: Window rule, see `SelectionRule.window`.
    """
    import torch

    pages = torch.arange(rows.padded // PAGE_SIZE, dtype=torch.float32)
    return select_tokens(rows, rule, pages.repeat(rows.count, 1, 1), per_unit=True)


def _rule_struct(rule: SelectionRule, num_head_groups: int) -> _SelectionRule:
    by_page = rule.granularity == "page"
    return _SelectionRule(
        num_head_groups, AGGREGATES[rule.head_aggregation], rule.budget, rule.sinks, rule.recent, by_page
    )
