"""Tree attention over a paged KV cache, and copies of keys and values within it: `tree.cpp` for torch.

The cache has the layout of `paged_decode`. The tokens of a tree occupy consecutive positions, the root first.
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

MAX_DEVICE_NODES = 63  # of a tree whose shape only the device knows: a row of its attention mask has 64 bits


@functools.cache
def load_tree_library() -> ctypes.CDLL:
    """Load the compiled kernels, and declare their signatures.

    Raises:
        NoCompiler: The kernels are not in the user's cache, and there is no C++ compiler.
    """
    lib = cpp_build.load("tree", Path(__file__).parent)
    strided = (c_void_p, c_int64)
    lib.pilotfish_read_trees.argtypes = (
        c_int,
        POINTER(CacheView),
        POINTER(PromptSpans),
        c_float,
        *strided,
        *strided,
        c_int,
    )
    lib.pilotfish_move.argtypes = (c_int, POINTER(CacheView), c_int, c_void_p, c_void_p, c_int, c_int)
    return lib


class CPUTreeBatch:
    """The draft trees of a step."""

    def __init__(
        self,
        request: Sequence[int],
        token: Sequence[int],
        context: Sequence[int],
        seen: Sequence[NDArray[np.bool_]],
        query_heads: int,
    ) -> None:
        """Describe the trees.

        Args:
            request: [count] row of each tree in the block table.
            token: [count] row of each tree's root in query and output.
            context: [count] number of tokens that each root attends to, itself included.
            seen: [count] attention mask of each tree, [n + 1, n + 1] bool for n draft tokens; token i attends to token
                j if entry [i, j] is true, and token 0 is the root.
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
    """Pack the attention mask of a tree, [n, n] bool, into bits, [n, ceil(n / 32)] uint32."""
    n = len(mask)
    padded = np.zeros((n, -(-n // PAGE_SIZE) * PAGE_SIZE), bool)
    padded[:, :n] = mask
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def tree_attention(
    query: "Tensor", cache: "Tensor", block_table: "Tensor", trees: CPUTreeBatch, scale: float, output: "Tensor"
) -> None:
    """Compute the attention of the trees' tokens, and write their rows of ``output``.

    The keys and values of the tokens must be in the cache.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the dtype of the query.
        block_table: [num_requests, max_blocks] int32.
        trees: Query tokens and their attention masks.
        scale: Softmax scale.
        output: [num_tokens, num_heads, head_size], heads contiguous, in the dtype of the query.

    Raises:
        ValueError: The kernels do not support a shape, stride or dtype; see `paged_decode.checked_cache_view`.
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
    """A function that moves the keys and values of tokens in the caches of all layers."""

    def __init__(self, caches: "Sequence[Tensor]") -> None:
        """Keep references to the caches of all layers.

        Args:
            caches: For each layer [num_blocks, num_kv_heads, block_size, 2 * head_size], all of the same dtype.
        """
        self._type, self._kept = DTYPES[str(caches[0].dtype)], list(caches)
        self._layers = (CacheView * len(caches))(*map(cache_view, caches))

    def __call__(self, source: "Tensor", target: "Tensor") -> None:
        """Copy keys and values from source slots to target slots, one token after the other.

        Args:
            source: [num_tokens] int64 slots; a slot is block * block_size + offset.
            target: [num_tokens] int64 slots.
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
