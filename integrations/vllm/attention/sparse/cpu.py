"""vLLM's CPU attention backend, with layers that read the positions which an earlier layer chose.

Stands over ``CPU_ATTN`` where a KV policy is selected. In a decode step the requests whose context exceeds the budget
go through our kernel, in every layer as the policy's plan says; all others, and all prefill, through vLLM's. What was
chosen is kept in the metadata of the step, which its layers share, and ends with it: prefix caching, preemption and
chunked prefill meet no state of ours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from .....kvcache import reference
from .....kvcache.kernels import paged_decode
from .....kvcache.kernels.paged_decode import DecodeBatch, SelectedTokens
from .....kvcache.selection import ReadPlan, Role
from .. import compatibility
from ..cpu_split import SplitBuilder
from .common import LayerRoleMixin, read_plan_for, reduce_over_ranks

# Given the rows and their scaled scores [rows, query_heads, padded], which it must leave as they are.
Observer = Callable[[DecodeBatch, torch.Tensor], None]


@dataclass
class SparseCPUStep:
    """The requests of one step that our kernel serves, and what its layers have chosen so far.

    Attributes:
        plan: What each layer reads.
        rows: Those requests' tokens.
        others: Metadata for vLLM's kernel with those requests cut to one position; None when there are no others.
        choice: The latest choice.
        observe: Sees the scores of layers that choose; see `SparseBuilder`.
    """

    plan: ReadPlan
    rows: DecodeBatch
    others: CPUAttentionMetadata | None
    choice: SelectedTokens | None = None
    observe: "Observer | None" = None


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata, whole, and our part of the step."""

    step: SparseCPUStep | None = None


class SparseCPUBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with our metadata and our forward."""

    @staticmethod
    def get_impl_cls() -> type["SparseCPUImpl"]:
        """The attention of a layer."""
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type["SparseCPUMetadataBuilder"]:
        """What builds the metadata of a step."""
        return SparseCPUMetadataBuilder


class SparseCPUMetadataBuilder(SplitBuilder):
    """Finds the requests of a step that decode beyond the budget.

    Attributes:
        plan: What layers read.
        observe: For measurements: called by every layer that chooses.
    """

    observe: Observer | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        error = self_test_sparse_cpu(
            self.dtype, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, self.isa
        )
        how = f"over CPU_ATTN, cache layout {self.isa}"
        self.plan, self.announce = read_plan_for(vllm_config, layer_names, error, how)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SparseCPUMetadata:
        """vLLM's metadata, and our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return SparseCPUMetadata(**vars(stock), step=self._step(stock, common_attn_metadata))

    def _step(self, stock: CPUAttentionMetadata, common: Any) -> SparseCPUStep | None:
        if stock.max_seq_len <= self.plan.rule.budget or not stock.causal:
            return None
        starts = common.query_start_loc_cpu.tolist()
        contexts = stock.seq_lens.tolist()
        requests = [
            r for r in range(common.num_reqs) if starts[r + 1] - starts[r] == 1 and contexts[r] > self.plan.rule.budget
        ]
        if not requests:
            return None
        self.announce(stock.max_seq_len)
        rows = DecodeBatch(requests, [starts[r] for r in requests], [contexts[r] for r in requests], self.num_heads)
        others = None if len(requests) == common.num_reqs else self.without(stock, requests)
        return SparseCPUStep(self.plan, rows, others, observe=self.observe)


class SparseCPUImpl(LayerRoleMixin, CPUAttentionBackendImpl):
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
        step = getattr(attn_metadata, "step", None)
        if step is None or compatibility.is_windowed(self):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if step.others is not None:
            super().forward(layer, query, key, value, kv_cache, step.others, output, output_scale, output_block_scale)
        self._decode(self.role(layer, step.plan), query, kv_cache, attn_metadata.block_table, output, step)  # type: ignore[union-attr]
        return output

    def _decode(
        self,
        role: Role,
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        step: SparseCPUStep,
    ) -> None:
        rows, rule = step.rows, step.plan.rule
        if role is Role.SPARSE:  # before the first choice there is none, and everything is read
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, step.choice)
        elif role is Role.FULL:
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output)
        else:
            logits = torch.empty(rows.count, rows.query_heads, rows.padded)
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, logits=logits)
            if step.observe is not None:
                step.observe(rows, logits)
            scores = paged_decode.token_scores(rows, rule, self.num_kv_heads, logits)
            reduce_over_ranks(scores, rule)
            step.choice = paged_decode.select_tokens(rows, rule, scores)


@functools.cache
def self_test_sparse_cpu(
    dtype: torch.dtype, query_heads: int, kv_heads: int, head_size: int, block_size: int, isa: str
) -> str | None:
    """Self-test: our kernel over a small cache that vLLM's own has filled, against attention computed plainly."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    context = block_size + 33
    query, key, value = (
        random(1, query_heads, head_size),
        random(context, kv_heads, head_size),
        random(context, kv_heads, head_size),
    )
    cache = torch.zeros(3, kv_heads, block_size, 2 * head_size, dtype=dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.cat([torch.arange(block_size) + 2 * block_size, torch.arange(33)])
    keys, values = cache.view(3, kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
    output = torch.empty_like(query)
    paged_decode.paged_decode_attention(
        query, cache, table, DecodeBatch([0], [0], [context], query_heads), head_size**-0.5, output
    )

    q, k, v = (x.double().numpy() for x in (query[0], key, value))
    _, expected = reference.attention(q, k, v, head_size**-0.5)
    worst = abs(output[0].double().numpy() - expected).max()
    return None if worst < 0.02 else f"the kernel misreads the cache layout '{isa}' (self-test: off by {worst:.3g})"
