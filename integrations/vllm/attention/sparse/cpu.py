"""Sparse attention on vLLM's CPU backend: layers that read only the tokens that an earlier layer selected.

Replaces ``CPU_ATTN`` if a KV policy is selected. In a decode step, requests whose context exceeds the budget go through
our kernel, in every layer as the policy's read plan says; all other requests and all prefill go through vLLM's kernel.
Selected tokens are kept in the metadata of the step, which its layers share, and are discarded with it. No state
outlives a step, so prefix caching, preemption and chunked prefill work unchanged.
"""

import functools
from collections.abc import Callable, Iterator
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

# Called with the query tokens and their scaled logits [rows, query_heads, padded], which it must not modify.
Observer = Callable[[DecodeBatch, torch.Tensor], None]

LOGITS_BYTES = 64 << 20  # maximum size of a selection layer's logits; larger batches are split


@dataclass
class SparseCPUStep:
    """Requests of one step that our kernel serves, and the latest token selection.

    Attributes:
        plan: Read plan of the policy.
        rows: Query tokens of those requests.
        others: Metadata for vLLM's kernel with those requests cut to one token; None if there are no other requests.
        choice: Latest token selection; None before the first.
        window: Tokens that window layers read; None before the first of them.
        observe: Callback for the logits of selecting layers; see `SparseCPUMetadataBuilder`.
    """

    plan: ReadPlan
    rows: DecodeBatch
    others: CPUAttentionMetadata | None
    choice: SelectedTokens | None = None
    window: SelectedTokens | None = None
    observe: "Observer | None" = None


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step, extended by our part.

    Attributes:
        step: Requests that our kernel serves; None if there are none.
    """

    step: SparseCPUStep | None = None


class SparseCPUBackend(CPUAttentionBackend):
    """Subclass of ``CPU_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type["SparseCPUImpl"]:
        """Return the class of the attention implementation."""
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type["SparseCPUMetadataBuilder"]:
        """Return the class of the metadata builder."""
        return SparseCPUMetadataBuilder


class SparseCPUMetadataBuilder(SplitBuilder):
    """Metadata builder that finds the requests which decode with a context beyond the budget.

    Attributes:
        plan: Read plan of the policy.
        announce: Callable that logs the first sparse step.
        observe: Callback for measurements, called by every layer that selects tokens.
    """

    observe: Observer | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        error = self_test_sparse_cpu(
            self.dtype, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, self.isa
        )
        how = f"over CPU_ATTN, cache layout {self.isa}, logits of up to {LOGITS_BYTES >> 20} MiB in a selection layer,"
        self.plan, self.announce = read_plan_for(vllm_config, layer_names, error, lambda rule: how)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SparseCPUMetadata:
        """Build vLLM's metadata, extended by our part of the step."""
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
    """Attention implementation of one layer."""

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
        """Compute attention; shapes are those of vLLM's `CPUAttentionBackendImpl.forward`."""
        step = getattr(attn_metadata, "step", None)
        if step is None or compatibility.has_sliding_window(self):
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
        rows = step.rows
        if role is Role.SPARSE:  # without a selection, before the first one, all tokens are read
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, step.choice)
        elif role is Role.WINDOW:
            if step.window is None:
                step.window = paged_decode.select_window(rows, step.plan.rule.window)
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, step.window)
        elif role is Role.FULL:
            paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output)
        else:
            attended = output if step.plan.full_selection else None
            step.choice = SelectedTokens.cat(
                [self._select(query, cache, table, attended, step, part) for part in self._parts(step)]
            )
            if attended is None:
                paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, step.choice)

    def _parts(self, step: SparseCPUStep) -> Iterator[DecodeBatch]:
        """Split the query tokens of a step into parts such that the logits of `_select` have a bounded size."""
        return step.rows.parts(LOGITS_BYTES)

    def _select(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor | None,
        step: SparseCPUStep,
        rows: DecodeBatch,
    ) -> SelectedTokens:
        """Select the tokens of some requests of a step; also compute full attention if there is an ``output``."""
        logits = torch.empty(rows.count, rows.query_heads, rows.padded)
        paged_decode.paged_decode_attention(query, cache, table, rows, self.scale, output, logits=logits)
        if step.observe is not None:
            step.observe(rows, logits)
        scores = paged_decode.token_scores(rows, step.plan.rule, self.num_kv_heads, logits)
        reduce_over_ranks(scores, step.plan.rule)
        return paged_decode.select_tokens(rows, step.plan.rule, scores)


@functools.cache
def self_test_sparse_cpu(
    dtype: torch.dtype, query_heads: int, kv_heads: int, head_size: int, block_size: int, isa: str
) -> str | None:
    """Compare our kernel, on a cache written by vLLM's kernel, with reference attention.

    Returns:
        An error message, or None if they agree.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rest = block_size // 2 + 1  # tokens in the second block
    context = block_size + rest
    query, key, value = (
        random(1, query_heads, head_size),
        random(context, kv_heads, head_size),
        random(context, kv_heads, head_size),
    )
    cache = torch.zeros(3, kv_heads, block_size, 2 * head_size, dtype=dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.cat([torch.arange(block_size) + 2 * block_size, torch.arange(rest)])
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
