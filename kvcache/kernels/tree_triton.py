"""Tree attention on a GPU, over the cache of vLLM's Triton backend; the counterpart of `tree`.

The cache is [num_blocks, num_kv_heads, block_size, 2 * head_size]: K and then V in the last dimension, which is
contiguous; the other dimensions may have any strides. The context is split among programs, and the splits are merged by
log-sum-exp, as in `head_cache_triton`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from . import programs_tree_triton as kernels
from .launch import MIN_DOT_ROWS, SPLITS_AT_ONCE, KernelConfig, KernelConfigs
from .tree import pack_mask

if TYPE_CHECKING:
    from torch import Tensor

    from .device_tree_triton import TreeBatchView

CONFIGS = KernelConfigs(
    KernelConfig(256, 64, num_warps=8, num_stages=2),
    KernelConfig(128, 64, num_warps=8, num_stages=2),
    KernelConfig(64, 64, num_warps=4, num_stages=2),
    KernelConfig(64, 32, num_warps=4, num_stages=2),
)
TARGET_PROGRAMS = 512  # number of programs that keeps a large GPU busy; with fewer tiles, contexts are split
MAX_SPLITS = 64  # of one context
MIN_SPLIT = 256  # tokens


class TritonTreeBatch:
    """The draft trees of a step, on the device; see `tree.CPUTreeBatch`."""

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
    query: "Tensor",
    cache: "Tensor",
    block_table: "Tensor",
    trees: "TritonTreeBatch | TreeBatchView",
    scale: float,
    output: "Tensor",
) -> None:
    """Compute the attention of the trees' tokens, and write their rows of ``output``; see `tree.tree_attention`.

    Raises:
        ValueError: The kernels do not support a stride.
    """
    _, heads, head_size = query.shape
    kv_heads, block_size = cache.shape[1], cache.shape[2]
    if query.stride()[1:] != (head_size, 1) or output.stride()[1:] != (head_size, 1) or cache.stride(3) != 1:
        raise ValueError(
            f"unsupported strides: query {query.stride()}, cache {cache.stride()}, output {output.stride()}"
        )
    num_queries_per_kv = heads // kv_heads
    sizes = {"HEADS": heads, "HEAD_SIZE": head_size, "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size)}

    def launch_attention(config: KernelConfig) -> None:
        most = max(MIN_DOT_ROWS, triton.next_power_of_2(trees.longest * num_queries_per_kv))
        rows = max(min(config.rows, most), triton.next_power_of_2(num_queries_per_kv))
        together = rows // num_queries_per_kv
        tiles = triton.cdiv(trees.longest, together)
        splits = min(
            MAX_SPLITS,
            triton.cdiv(TARGET_PROGRAMS, trees.count * tiles * kv_heads),
            triton.cdiv(trees.positions, MIN_SPLIT),
        )
        shape = len(trees.rows), heads, splits
        parts = torch.empty(*shape, head_size, dtype=torch.float32, device=query.device)
        tops, totals = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
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
            NUM_QUERIES_PER_KV=num_queries_per_kv,
            ROWS=rows,
            TOKENS=together,
            BLOCK=block_size,
            TILE=config.tile,
            **sizes,
            **config.options,
        )
        kernels.merge_tree_splits_kernel[(len(trees.rows), heads)](
            parts, tops, totals, trees.rows, output, splits, output.stride(0), **sizes, SPLITS_AT_ONCE=SPLITS_AT_ONCE
        )

    CONFIGS.run_first_fitting((query.device, query.dtype, head_size, num_queries_per_kv), launch_attention)


class TritonKVMover:
    """A function that moves the keys and values of tokens in the caches of all layers; see `tree.CPUKVMover`."""

    def __init__(self, caches: "Sequence[Tensor]") -> None:
        """Keep references to the caches of all layers.

        Args:
            caches: For each layer [num_blocks, num_kv_heads, block_size, 2 * head_size].
        """
        self._caches = list(caches)

    def __call__(self, source: "Tensor", target: "Tensor") -> None:
        """Copy keys and values from source slots to target slots, [num_tokens] int64 each.

        All sources are read before any target is written. The result is that of `tree.CPUKVMover`, as no target is a
        source that comes later in the list.
        """
        for cache in self._caches:
            block_size = cache.shape[2]
            cache[target // block_size, :, target % block_size] = cache[
                source // block_size, :, source % block_size
            ].clone()
