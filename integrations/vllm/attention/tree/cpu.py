"""vLLM's CPU attention backend, with requests whose query tokens are a tree.

Stands over ``CPU_ATTN`` where tree verification is selected. A tree's tokens lie in the cache one behind the other, the
root first, and each sees what lies before the tree, its ancestors and itself. Requests with a tree go through our
kernel, which reads what all nodes see once; all others, and every step without a tree, through vLLM's.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from .....kvcache.kernels.tree import CPUKVMover, CPUTreeBatch, tree_attention
from .....plugins.drafting.tree import tree_attention_mask
from ..cpu_split import SplitBuilder
from . import common


@dataclass
class TreeMetadata(CPUAttentionMetadata):
    """vLLM's metadata, whole, and our part of the step.

    Attributes:
        trees: The requests that our kernel serves.
        others: Metadata for vLLM's kernel with those requests cut to their query; None when there are no others.
    """

    trees: CPUTreeBatch | None = None
    others: CPUAttentionMetadata | None = None


class TreeCPUBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with our metadata and our forward."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUImpl"]:
        """The attention of a layer."""
        return TreeCPUImpl

    @staticmethod
    def get_builder_cls() -> type["TreeCPUMetadataBuilder"]:
        """What builds the metadata of a step."""
        return TreeCPUMetadataBuilder


class TreeCPUMetadataBuilder(common.TreeMetadataBuilder, SplitBuilder):
    """Finds the trees of a step, and moves what was accepted of them."""

    mover: ClassVar[type] = CPUKVMover

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        shape = (self.num_heads, self.num_kv_heads, self.head_dim, self.block_size)
        self.error = self_test_tree_cpu(self.dtype, *shape, self.isa)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TreeMetadata:
        """vLLM's metadata, and our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self.scheduled_trees:
            return TreeMetadata(**vars(stock))
        placed = self.tree_batch_arguments(stock.slot_mapping)
        others = None
        if len(self.scheduled_trees) < common_attn_metadata.num_reqs:
            others = self.without(stock, placed[0])
        return TreeMetadata(**vars(stock), trees=CPUTreeBatch(*placed, self.num_heads), others=others)


class TreeCPUImpl(CPUAttentionBackendImpl):
    """The attention of one layer."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; see there for the shapes."""
        step = getattr(attn_metadata, "trees", None)
        others = attn_metadata if step is None else attn_metadata.others  # type: ignore[union-attr]
        if step is None or others is not None:
            super().forward(layer, query, key, value, kv_cache, others, output, output_scale, output_block_scale)
        if step is not None:
            tree_attention(query, kv_cache, attn_metadata.block_table, step, self.scale, output)  # type: ignore[union-attr]
        return output


@functools.cache
def self_test_tree_cpu(
    dtype: torch.dtype, query_heads: int, kv_heads: int, head_size: int, block_size: int, isa: str
) -> str | None:
    """Self-test: our kernels over a small cache that vLLM's own has filled, against attention computed plainly."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parents = np.array([-1, 0, -1, 2, 3, 1, 4], np.int32)
    nodes, before = len(parents), block_size - 3  # the tree lies in two blocks
    keys, values = random(before + 1 + nodes, kv_heads, head_size), random(before + 1 + nodes, kv_heads, head_size)
    query = random(1 + nodes, query_heads, head_size)
    cache = torch.zeros(3, kv_heads, block_size, 2 * head_size, dtype=dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.cat([torch.arange(block_size) + 2 * block_size, torch.arange(block_size)])

    def store(into: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: torch.Tensor) -> None:
        halves = into.view(3, kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, *halves, where, isa)

    store(cache, keys, values, slots[: len(keys)])
    output, seen = torch.empty_like(query), tree_attention_mask(parents)
    try:
        step = CPUTreeBatch([0], [0], [before + 1], [seen], query_heads)
        tree_attention(query, cache, table, step, head_size**-0.5, output)
    except Exception as error:  # no compiler, a layout that is not read
        return str(error)
    worst = common.max_error(query, output, keys.double().numpy(), values.double().numpy(), before, seen)
    if not worst < 0.02:
        return f"the kernel misreads the cache layout '{isa}' (self-test: off by {worst:.3g})"
    path = [before + 1 + node for node in (2, 3, 4, 6)]
    targets = slots[before + 1 : before + 5]
    fresh = cache.clone()
    CPUKVMover([cache])(slots[path], targets)
    store(fresh, keys[path], values[path], targets)
    return None if torch.equal(cache, fresh) else f"moved tokens do not lie as '{isa}' would have written them"
