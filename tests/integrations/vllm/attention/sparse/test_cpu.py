"""Sparse CPU attention against vLLM's on the same cache, without an engine: random shapes, batches and dtypes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import reference
from pilotfish.kvcache.selection import ReadPlan, Role, SelectionRule

pytest.importorskip("vllm")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    """Disable the reduction over tensor-parallel ranks."""
    from pilotfish.integrations.vllm.attention.sparse import common

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "reduce_over_ranks", lambda scores, rule: None)
        yield


@dataclass(repr=False)
class Batch:
    """One engine step: requests with context lengths ``contexts``, whose last ``queries`` tokens are new."""

    contexts: list[int]
    queries: list[int]
    heads: int
    kv_heads: int
    size: int
    block: int
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"Batch({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    def __post_init__(self) -> None:
        from pilotfish.integrations.vllm.attention.sparse.cpu import SparseCPUImpl

        rng = torch.Generator().manual_seed(sum(self.contexts) + self.heads + self.block)
        self.queries = [min(q, c) for q, c in zip(self.queries, self.contexts, strict=True)]
        self.starts = [0, *itertools.accumulate(self.queries)]
        need = [-(-c // self.block) for c in self.contexts]
        order = torch.randperm(sum(need), generator=rng).int()
        self.table = torch.zeros(len(need), max(need), dtype=torch.int32)
        for r, end in enumerate(itertools.accumulate(need)):
            self.table[r, : need[r]] = order[end - need[r] : end]
        self.cache = torch.zeros(sum(need), self.kv_heads, self.block, 2 * self.size, dtype=self.dtype)
        self.query = torch.randn(self.starts[-1], self.heads, self.size, generator=rng).to(self.dtype)
        self.layer = SimpleNamespace(
            layer_name="model.layers.0.attn", isa="vec", _k_scale_float=1.0, _v_scale_float=1.0
        )
        self.impl: Any = object.__new__(SparseCPUImpl)
        vars(self.impl).update(
            sliding_window=-1,
            scale=self.size**-0.5,
            num_kv_heads=self.kv_heads,
            attn_type="decoder",
            kv_cache_dtype="auto",
            alibi_slopes=None,
            logits_soft_cap=0,
            sinks=None,
        )
        self.text = []
        for r, context in enumerate(self.contexts):
            key, value = (
                torch.randn(context, self.kv_heads, self.size, generator=rng).to(self.dtype) for _ in range(2)
            )
            positions = torch.arange(context)
            slots = self.table[r, positions // self.block].long() * self.block + positions % self.block
            self.impl.do_kv_cache_update(self.layer, key, value, self.cache, slots)
            self.text.append((key, value))

    def metadata(self, plan: ReadPlan) -> Any:
        """Return vLLM's metadata, extended by our metadata builder."""
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

        from pilotfish.integrations.vllm.attention.sparse.cpu import SparseCPUMetadata, SparseCPUMetadataBuilder

        starts, lens = (torch.tensor(x, dtype=torch.int32) for x in (self.starts, self.contexts))
        builder: Any = object.__new__(SparseCPUMetadataBuilder)
        vars(builder).update(
            plan=plan,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            dtype=self.dtype,
            window_size=-1,
            isa="vec",
            kv_cache_dtype="auto",
            announce=lambda context: None,
        )
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lens),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            seq_lens=lens,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=True,
        )
        stock = CPUAttentionMetadata(
            num_actual_tokens=self.starts[-1],
            max_query_len=max(self.queries),
            query_start_loc=starts,
            max_seq_len=max(self.contexts),
            seq_lens=lens,
            block_table=self.table,
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            scheduler_metadata=schedule,
        )
        step = builder._step(stock, SimpleNamespace(query_start_loc_cpu=starts, num_reqs=len(lens)))
        return SparseCPUMetadata(**vars(stock), step=step)

    def attend(self, metadata: Any, index: int = 0) -> torch.Tensor:
        """Run the layer ``index``, and return its output."""
        self.impl._index = index
        output = torch.zeros_like(self.query)
        return self.impl.forward(self.layer, self.query, None, None, self.cache, metadata, output)

    def rows(self, r: int) -> slice:
        """Return the query tokens of request ``r``."""
        return slice(self.starts[r], self.starts[r + 1])


@st.composite
def batches(draw: st.DrawFn, longest: int) -> Batch:
    """Draw batches with contexts of at most ``longest`` tokens."""
    contexts = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    kv_heads = draw(st.integers(1, 3))
    return Batch(
        contexts,
        draw(st.lists(st.sampled_from([1, 1, 1, 7, 40]), min_size=len(contexts), max_size=len(contexts))),
        kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        kv_heads,
        draw(st.sampled_from([32, 64, 96, 128])),
        draw(st.sampled_from([32, 64, 128])),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )


def plan_of(budget: int, *roles: Role, recent: int = 32) -> ReadPlan:
    """Return a read plan with page-level selection."""
    return ReadPlan(roles, SelectionRule(budget, 4, recent, "sum", "page"))


@settings(max_examples=40, deadline=None)
@given(batches(longest=400))
def test_full_budget_is_bitwise_identical(batch: Batch) -> None:
    stock = batch.attend(batch.metadata(ReadPlan((), SelectionRule(1 << 30, 0, 0, "sum", "page"))))
    for role in Role:
        metadata = batch.metadata(plan_of(416, role))
        assert metadata.step is None
        assert torch.equal(batch.attend(metadata), stock)


@settings(max_examples=40, deadline=None)
@given(batches(longest=900))
def test_requests_within_the_budget_and_prefill_match_vllm(batch: Batch) -> None:
    """Test that these requests match vLLM in any batch, and that the others attend to their selected tokens."""
    plan = plan_of(256, Role.SELECT, Role.SPARSE)
    stock = batch.attend(batch.metadata(ReadPlan((), SelectionRule(1 << 30, 0, 0, "sum", "page"))))
    metadata = batch.metadata(plan)
    full, selected = batch.attend(metadata, 0), batch.attend(metadata, 1)
    sparse = [r for r, c in enumerate(batch.contexts) if c > 256 and batch.queries[r] == 1]
    assert (metadata.step is not None) == bool(sparse)
    tolerance = TOLERANCE[batch.dtype]
    for r, context in enumerate(batch.contexts):
        rows = batch.rows(r)
        torch.testing.assert_close(full[rows], stock[rows], atol=tolerance, rtol=0)
        if r not in sparse:  # a different batch may be split differently, which changes rounding
            torch.testing.assert_close(selected[rows], stock[rows], atol=tolerance, rtol=0)
            continue
        positions = [p for p in metadata.step.choice.positions(sparse.index(r)) if p < context]
        assert len(positions) <= 256
        query = batch.query[rows][0].double().numpy()
        key, value = (x[positions].double().numpy() for x in batch.text[r])
        _, expected = reference.attention(query, key, value, batch.size**-0.5)
        np.testing.assert_allclose(selected[rows][0].double().numpy(), expected, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(batches(longest=900))
def test_window_layers_read_the_first_and_the_latest_pages(batch: Batch) -> None:
    metadata = batch.metadata(plan_of(256, Role.WINDOW))
    stock = batch.attend(batch.metadata(ReadPlan((), SelectionRule(1 << 30, 0, 0, "sum", "page"))))
    output = batch.attend(metadata, 0)
    for r, context in enumerate(batch.contexts):
        rows, tolerance = batch.rows(r), TOLERANCE[batch.dtype]
        if context <= 256 or batch.queries[r] > 1:
            torch.testing.assert_close(output[rows], stock[rows], atol=tolerance, rtol=0)
            continue
        positions = [p for p in range(context) if p < 32 or p // 32 > -(-context // 32) - 8]
        query = batch.query[rows][0].double().numpy()
        key, value = (x[positions].double().numpy() for x in batch.text[r])
        _, expected = reference.attention(query, key, value, batch.size**-0.5)
        np.testing.assert_allclose(output[rows][0].double().numpy(), expected, atol=tolerance)
