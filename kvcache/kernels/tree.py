"""Attention of draft trees over a paged cache, and keys and values moved in it: `tree.cpp` for torch.

The cache is as in `paged_decode`. The tokens of a tree lie in it one behind the other, the root first.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal import cpp_build

from ..selection import PAGE_SIZE
from .paged_decode import DTYPES, CacheView, PromptSpans, cache_view, checked_cache_view

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def load_tree_library() -> ctypes.CDLL:
    """The compiled kernels, with their signatures.

    Raises:
        NoCompiler: they are not in the cache, and nothing can compile them.
    """
    lib = cpp_build.load("tree", Path(__file__).parent)
    where = (c_void_p, c_int64)
    lib.pilotfish_read_trees.argtypes = (
        c_int,
        POINTER(CacheView),
        POINTER(PromptSpans),
        c_float,
        *where,
        *where,
        c_int,
    )
    lib.pilotfish_move.argtypes = (c_int, POINTER(CacheView), c_int, c_void_p, c_void_p, c_int, c_int)
    return lib


class CPUTreeBatch:
    """The trees of a step."""

    def __init__(
        self,
        request: Sequence[int],
        token: Sequence[int],
        context: Sequence[int],
        seen: Sequence[NDArray[np.bool_]],
        query_heads: int,
    ) -> None:
        """Gather them.

        Args:
            request: [count] their rows in the block table.
            token: [count] the rows of their roots in query and output.
            context: [count] positions before and at each root.
            seen: [count] for each [n + 1, n + 1], which of a tree's tokens each of them sees; the root is the first.
            query_heads: Number of query heads.
        """
        import torch

        bits = [pack_mask(mask) for mask in seen]
        begins = np.cumsum([0, *(b.size for b in bits[:-1])])
        self._bits = torch.from_numpy(np.concatenate([b.ravel() for b in bits]).view(np.int32))
        self._begins = torch.from_numpy(begins.astype(np.int64))
        self._numbers = torch.tensor([request, token, context, [len(m) for m in seen]], dtype=torch.int32)
        pointers = (x.data_ptr() for x in (*self._numbers, self._bits, self._begins))
        self.struct = PromptSpans(len(request), query_heads, *pointers)


def pack_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Which tokens of a tree each of them sees, [n, n], as bits, [n, words]."""
    n = len(mask)
    padded = np.zeros((n, -(-n // PAGE_SIZE) * PAGE_SIZE), bool)
    padded[:, :n] = mask
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def tree_attention(
    query: "Tensor", cache: "Tensor", block_table: "Tensor", trees: CPUTreeBatch, scale: float, output: "Tensor"
) -> None:
    """Attention of the trees' tokens, whose keys and values are in the cache; writes their rows of ``output``.

    Args:
        query: [tokens, query_heads, head_size], heads contiguous.
        cache: [blocks, kv_heads, block_size, 2 * head_size] in the type of the query.
        block_table: [requests, blocks] int32.
        trees: Which tokens, and what they see.
        scale: Of the scores.
        output: As ``query``.

    Raises:
        ValueError: as `paged_decode.view`.
    """
    import torch

    paged = checked_cache_view(query, cache, block_table, output)
    load_tree_library().pilotfish_read_trees(
        DTYPES[str(query.dtype)],
        byref(paged),
        byref(trees.struct),
        scale,
        query.data_ptr(),
        query.stride(0),
        output.data_ptr(),
        output.stride(0),
        torch.get_num_threads(),
    )


class CPUKVMover:
    """Moves tokens within the caches of all layers."""

    def __init__(self, caches: "Sequence[Tensor]") -> None:
        """Look at ``caches``, each [blocks, kv_heads, block_size, 2 * head_size], all of one type."""
        self._type, self._kept = DTYPES[str(caches[0].dtype)], list(caches)
        self._layers = (CacheView * len(caches))(*map(cache_view, caches))

    def __call__(self, source: "Tensor", target: "Tensor") -> None:
        """Copy keys and values from slots to slots, [tokens] int64 each, one after the other.

        A slot is block * block_size + offset.
        """
        import torch

        source, target = source.contiguous(), target.contiguous()
        load_tree_library().pilotfish_move(
            self._type,
            self._layers,
            len(self._layers),
            source.data_ptr(),
            target.data_ptr(),
            len(source),
            torch.get_num_threads(),
        )
