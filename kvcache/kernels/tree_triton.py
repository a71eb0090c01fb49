"""As `tree`, for GPUs, over the cache of vLLM's Triton backend.

That is [blocks, kv_heads, block_size, 2 * head_size], in any order of strides but the last: each position has its key
and behind it its value. What lies before a tree is split among programs and merged by log-sum-exp, as in
`head_cache_triton`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from . import programs_tree_triton as kernels
from .head_cache_triton import MAX_SPLITS, MIN_DOT_ROWS, PROMPT_ROWS, TARGET_PROGRAMS, TILE
from .tree import pack_mask

if TYPE_CHECKING:
    from torch import Tensor


class TritonTreeBatch:
    """The trees of a step, on the device; see `tree.Trees`."""

    def __init__(
        self,
        request: Sequence[int],
        token: Sequence[int],
        context: Sequence[int],
        seen: Sequence[NDArray[np.bool_]],
        device: torch.device,
    ) -> None:
        bits = [pack_mask(mask) for mask in seen]
        begins = np.cumsum([0, *(b.size for b in bits[:-1])])
        lengths = [len(mask) for mask in seen]
        firsts = np.cumsum([0, *lengths[:-1]])
        numbers = np.array([request, token, [c - 1 for c in context], lengths, begins, firsts], np.int32).T
        rows = np.concatenate([np.arange(t, t + n) for t, n in zip(token, lengths, strict=True)]).astype(np.int32)
        self.numbers = torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
        self.bits = torch.from_numpy(np.concatenate([b.ravel() for b in bits]).view(np.int32)).to(device)
        self.rows = torch.from_numpy(rows).to(device)
        self.count, self.longest = len(lengths), max(lengths)
        self.positions = max(c + n for c, n in zip(context, lengths, strict=True)) - 1


def tree_attention(
    query: "Tensor", cache: "Tensor", block_table: "Tensor", trees: TritonTreeBatch, scale: float, output: "Tensor"
) -> None:
    """Attention of the trees' tokens, see `tree.read_trees`.

    Raises:
        ValueError: shapes or strides that the kernels do not read.
    """
    _, heads, size = query.shape
    kv_heads, block_size = cache.shape[1], cache.shape[2]
    if query.stride()[1:] != (size, 1) or output.stride()[1:] != (size, 1) or cache.stride(3) != 1:
        raise ValueError(f"strides of query {query.stride()}, cache {cache.stride()}, output {output.stride()}")
    share = heads // kv_heads
    rows = max(MIN_DOT_ROWS, PROMPT_ROWS, triton.next_power_of_2(share))
    together = rows // share
    tiles = triton.cdiv(trees.longest, together)
    splits = min(
        MAX_SPLITS, triton.cdiv(TARGET_PROGRAMS, trees.count * tiles * kv_heads), triton.cdiv(trees.positions, 4 * TILE)
    )
    shape = len(trees.rows), heads, splits
    parts = torch.empty(*shape, size, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
    sizes = {"HEADS": heads, "SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size)}
    kernels.tree_attention_kernel[(trees.count * tiles, kv_heads, splits)](
        query,
        cache,
        block_table,
        trees.numbers,
        trees.bits,
        parts,
        tops,
        totals,
        scale,
        query.stride(0),
        *cache.stride()[:3],
        block_table.stride(0),
        tiles,
        SHARE=share,
        ROWS=rows,
        TOKENS=together,
        BLOCK=block_size,
        TILE=TILE,
        **sizes,
    )
    kernels.merge_tree_splits_kernel[(len(trees.rows), heads)](
        parts, tops, totals, trees.rows, output, splits, output.stride(0), **sizes
    )


class TritonKVMover:
    """Moves tokens within the caches of all layers, see `tree.Mover`."""

    def __init__(self, caches: "Sequence[Tensor]") -> None:
        """Look at ``caches``, each [blocks, kv_heads, block_size, 2 * head_size]."""
        self._caches = list(caches)

    def __call__(self, source: "Tensor", target: "Tensor") -> None:
        """Copy keys and values from slots to slots, [tokens] each.

        All are read before any is written: as in `tree.Mover`, where no target lies behind a source still to be read.
        """
        for cache in self._caches:
            size = cache.shape[2]
            cache[target // size, :, target % size] = cache[source // size, :, source % size].clone()
