"""Page bounds of a paged KV cache (minimum and maximum key per channel), and page selection: `page_bounds.cpp`.

The cache has the layout of `paged_decode`. Bounds are indexed by pages of the cache, not of a request: blocks that
requests share, by prefix caching, have one set of bounds.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish._internal import cpp_build

from ..selection import PAGE_SIZE, SelectionRule
from . import paged_decode
from .paged_decode import DTYPES, CacheView, DecodeBatch, SelectedTokens, cache_view

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def load_page_bounds_library() -> ctypes.CDLL:
    """Load the compiled kernels, and declare their signatures.

    Raises:
        NoCompiler: The kernels are not in the user's cache, and there is no C++ compiler.
    """
    lib = cpp_build.load("page_bounds", Path(__file__).parent)
    cache, strided = POINTER(CacheView), (c_void_p, c_int64)
    lib.pilotfish_update_bounds.argtypes = (c_int, cache, c_void_p, c_int, c_void_p, c_int)
    lib.pilotfish_bound_logits.argtypes = (c_int, cache, c_void_p, c_void_p, c_float, *strided, *strided, c_int)
    return lib


def allocate_bounds(cache: "Tensor") -> "Tensor":
    """Allocate zeroed page bounds for a cache.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].

    Returns:
        [num_blocks * block_size / 32, num_kv_heads, 2, head_size] in the cache's dtype: minimum, then maximum.
    """
    blocks, kv_heads, block_size, width = cache.shape
    return cache.new_zeros(blocks * (block_size // PAGE_SIZE), kv_heads, 2, width // 2)


def update_bounds(cache: "Tensor", bounds: "Tensor", slots: "Tensor") -> None:
    """Compute the bounds of the pages to which keys were written.

    The bounds are recomputed from the keys of the page up to its last written slot. Stale keys of an earlier request or
    of rejected draft tokens are therefore not included.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], with the new keys.
        bounds: Bounds of the cache, from `allocate_bounds`; overwritten in part.
        slots: [tokens] int64 slots of the new keys, those of a request in ascending order; negative ones are padding.
    """
    import torch

    load_page_bounds_library().pilotfish_update_bounds(
        DTYPES[str(cache.dtype)],
        byref(cache_view(cache)),
        slots.data_ptr(),
        len(slots),
        bounds.data_ptr(),
        torch.get_num_threads(),
    )


def bound_logits(
    query: "Tensor", cache: "Tensor", bounds: "Tensor", block_table: "Tensor", rows: DecodeBatch, scale: float
) -> "Tensor":
    """Compute an upper bound of the scaled query-key products in each page.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query.
        bounds: Bounds of the cache.
        block_table: [num_requests, max_blocks] int32.
        rows: Query tokens of the batch.
        scale: Softmax scale.

    Returns:
        [count, num_heads, pages] float32, undefined beyond the pages of a context; the number of pages is padded.
    """
    import torch

    pages = rows.padded // PAGE_SIZE
    logits = torch.empty(rows.count, rows.query_heads, -(-pages // PAGE_SIZE) * PAGE_SIZE)
    load_page_bounds_library().pilotfish_bound_logits(
        DTYPES[str(query.dtype)],
        byref(cache_view(cache, block_table.data_ptr(), block_table.stride(0))),
        ctypes.addressof(rows.struct),
        bounds.data_ptr(),
        scale,
        query.data_ptr(),
        query.stride(0),
        logits.data_ptr(),
        logits.shape[2],
        torch.get_num_threads(),
    )
    return logits


def select_pages(
    rows: DecodeBatch,
    rule: SelectionRule,
    kv_heads: int,
    logits: "Tensor",
    reduce: "Callable[[Tensor, SelectionRule], None] | None" = None,
) -> SelectedTokens:
    """Select the pages that can hold the most attention, by a softmax over their bounds.

    Args:
        rows: Query tokens of the batch.
        rule: Selection rule with the granularity ``page``.
        kv_heads: Number of KV heads.
        logits: Result of `bound_logits`; overwritten.
        reduce: Function that reduces scores over tensor-parallel ranks in place.

    Returns:
        The selected tokens of each query token and head group; sinks, recent tokens and the current one are included.
    """
    pages = [-(-context // PAGE_SIZE) for context in rows.context]
    of_pages = DecodeBatch(rows.request, rows.token, pages, rows.query_heads)
    scores = paged_decode.token_scores(of_pages, rule, kv_heads, logits)
    if reduce is not None:
        reduce(scores, rule)
    return paged_decode.select_tokens(rows, rule, scores, per_unit=True)
