"""Tree attention on vLLM's CPU backend: for requests whose query tokens form a draft tree.

Replaces ``CPU_ATTN`` if tree verification is selected. The tokens of a tree are contiguous in the cache, the root
first; each attends to the tokens before the tree, its ancestors and itself. Requests with a tree go through our kernel,
which reads the tokens before the tree once for all nodes; all other requests, and steps without trees, go through
vLLM's kernel.
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
    """vLLM's metadata of a step, extended by our part.

    Attributes:
        trees: Draft trees that our kernel serves; None if there are none.
        others: Metadata for vLLM's kernel with those requests cut to their query tokens; None if there are no others.
    """

    trees: CPUTreeBatch | None = None
    others: CPUAttentionMetadata | None = None


class TreeCPUBackend(CPUAttentionBackend):
    """Subclass of ``CPU_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUImpl"]:
        """Return the class of the attention implementation."""
        return TreeCPUImpl

    @staticmethod
    def get_builder_cls() -> type["TreeCPUMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return TreeCPUMetadataBuilder


class TreeCPUMetadataBuilder(common.TreeMetadataBuilder, SplitBuilder):
    """Metadata builder that adds the draft trees of a step and moves the KV of accepted tokens."""

    mover: ClassVar[type] = CPUKVMover

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        shape = (self.num_heads, self.num_kv_heads, self.head_dim, self.block_size)
        self.error = self_test_tree_cpu(self.dtype, *shape, self.isa)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TreeMetadata:
        """Build vLLM's metadata, extended by our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self.scheduled_trees:
            return TreeMetadata(**vars(stock))
        trees = self.tree_batch_arguments(stock.slot_mapping)
        others = None
        if len(self.scheduled_trees) < common_attn_metadata.num_reqs:
            others = self.without(stock, trees[0])
        return TreeMetadata(**vars(stock), trees=CPUTreeBatch(*trees, self.num_heads), others=others)


class TreeCPUImpl(common.TreeImpl, CPUAttentionBackendImpl):
    """Attention implementation of one layer."""

    tree_attention = staticmethod(tree_attention)


@functools.cache
def self_test_tree_cpu(
    dtype: torch.dtype, query_heads: int, kv_heads: int, head_size: int, block_size: int, isa: str
) -> str | None:
    """Compare our kernels, on a cache written by vLLM's kernel, with reference attention.

    Returns:
        An error message, or None if they agree.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parents = np.array([-1, 0, -1, 2, 3, 1, 4], np.int32)
    nodes, before = len(parents), block_size - 3  # the tree spans two blocks
    keys, values = random(before + 1 + nodes, kv_heads, head_size), random(before + 1 + nodes, kv_heads, head_size)
    query = random(1 + nodes, query_heads, head_size)
    cache = torch.zeros(3, kv_heads, block_size, 2 * head_size, dtype=dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.cat([torch.arange(block_size) + 2 * block_size, torch.arange(block_size)])

    def store(into: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        halves = into.view(3, kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, *halves, slot_mapping, isa)

    store(cache, keys, values, slots[: len(keys)])
    output, mask = torch.empty_like(query), tree_attention_mask(parents)
    try:
        step = CPUTreeBatch([0], [0], [before + 1], [mask], query_heads)
        tree_attention(query, cache, table, step, head_size**-0.5, output)
    except Exception as error:  # no compiler, or a cache layout that the kernel does not read
        return str(error)
    worst = common.max_error(query, output, keys.double().numpy(), values.double().numpy(), before, mask)
    if not worst < 0.02:
        return f"the kernel misreads the cache layout '{isa}' (self-test: off by {worst:.3g})"
    path = [before + 1 + node for node in (2, 3, 4, 6)]
    targets = slots[before + 1 : before + 5]
    fresh = cache.clone()
    CPUKVMover([cache])(slots[path], targets)
    store(fresh, keys[path], values[path], targets)
    return (
        None
        if torch.equal(cache, fresh)
        else f"moved tokens differ from tokens that vLLM writes in the cache layout '{isa}'"
    )
