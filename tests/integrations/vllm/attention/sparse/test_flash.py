"""FlashAttention with shortened block tables; a reference implementation replaces its kernel, which needs a GPU."""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pilotfish.kvcache import reference
from pilotfish.kvcache.selection import Granularity, ReadPlan, Role, SelectionRule

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces a kernel on the CPU")

CONTEXTS, QUERIES, HEADS, KV_HEADS, SIZE, BLOCK = [300, 90, 260, 333], [1, 1, 4, 1], 4, 2, 32, 16
STARTS = [0, 1, 2, 6, 7]
EAGER = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False))


def paged_attention(**call: Any) -> None:
    """Compute the same as ``flash_attn_varlen_func``, from the same arguments."""
    assert call["scheduler_metadata"] is None or call["scheduler_metadata"] == "whole"
    calls.append(call)
    starts, lens = call["cu_seqlens_q"].tolist(), call["seqused_k"].tolist()
    for r, length in enumerate(lens):
        positions = np.arange(length)
        blocks = call["block_table"][r].numpy()[positions // BLOCK]
        k, v = (call[x].numpy()[blocks, positions % BLOCK] for x in ("k", "v"))
        for row in range(starts[r], starts[r + 1]):
            visible = length - (starts[r + 1] - 1 - row)
            _, out = reference.attention(call["q"][row].numpy(), k[:visible], v[:visible], call["softmax_scale"])
            call["out"][row] = torch.from_numpy(out).float()


calls: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def flash(interpreted_triton: None) -> Any:
    return importlib.import_module("pilotfish.integrations.vllm.attention.sparse.flash_attn")


def build(flash: Any, rule: SelectionRule, full_selection: bool = True) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Return a layer's attention, metadata of a step, queries, and a filled cache."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    impl: Any = object.__new__(flash.SparseFlashImpl)
    vars(impl).update(
        attn_type="decoder",
        head_size=SIZE,
        num_kv_heads=KV_HEADS,
        scale=SIZE**-0.5,
        sliding_window=(-1, -1),
        kv_cache_dtype="auto",
        logits_soft_cap=0,
        alibi_slopes=None,
        sinks=None,
        vllm_flash_attn_version=2,
        fa4_hd256=False,
        supports_quant_query_input=False,
        dcp_world_size=1,
    )
    builder: Any = object.__new__(flash.SparseFlashMetadataBuilder)
    plan = ReadPlan((Role.FULL, Role.SELECT, Role.SPARSE, Role.WINDOW), rule, full_selection=full_selection)
    vars(builder).update(plan=plan, _compilation_config=EAGER, _longest=512, announce=lambda context: None)
    generator = torch.Generator().manual_seed(0)
    need = [-(-c // BLOCK) for c in CONTEXTS]
    order = torch.randperm(sum(need), generator=generator).int()
    table = torch.zeros(len(need), max(need), dtype=torch.int32)
    for r, n in enumerate(need):
        table[r, :n], order = order[:n], order[n:]
    numbers = {"dtype": torch.int32}
    stock = FlashAttentionMetadata(
        num_actual_tokens=STARTS[-1],
        max_query_len=max(QUERIES),
        query_start_loc=torch.tensor(STARTS, **numbers),
        max_seq_len=max(CONTEXTS),
        seq_lens=torch.tensor(CONTEXTS, **numbers),
        block_table=table,
        slot_mapping=torch.zeros(0),
        scheduler_metadata="whole",  # type: ignore[arg-type]
    )
    cache = torch.randn(sum(need), KV_HEADS, BLOCK, 2 * SIZE, generator=generator)
    query = torch.randn(STARTS[-1], HEADS, SIZE, generator=generator)
    return impl, builder._with_step(stock), query, cache


@pytest.mark.parametrize(
    "rule",
    [
        SelectionRule(160, 4, 32, "sum", "page"),
        SelectionRule(100, 4, 32, "kv_head", "token"),
        SelectionRule(160, 4, 32, "sum", "page", window_size=64),  # less than the context of a request in the budget
    ],
    ids=["shortened tables", "our kernel", "small window"],
)
def test_sparse_requests_attend_to_selected_tokens_and_others_to_all(
    flash: Any, monkeypatch: pytest.MonkeyPatch, rule: SelectionRule
) -> None:
    from vllm.v1.attention.backends import flash_attn

    from pilotfish.integrations.vllm.attention.sparse import common

    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", paged_attention)
    monkeypatch.setattr(common, "reduce_over_ranks", lambda scores, rule: None)  # single rank
    impl, metadata, query, cache = build(flash, rule)
    calls.clear()
    outputs = []
    for index in range(4):
        impl._index = index
        layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1), _q_scale=torch.ones(1))
        outputs.append(impl.forward(layer, query, query, query, cache, metadata, torch.zeros_like(query)))
    assert torch.equal(outputs[0], outputs[1]), "a re-selection layer attends to all tokens"
    assert [c["scheduler_metadata"] for c in calls] == ["whole", "whole", None, None]
    selected = metadata.step.selected
    for r, context in enumerate(CONTEXTS):
        rows = slice(STARTS[r], STARTS[r + 1])
        if QUERIES[r] > 1 or context <= rule.budget:
            torch.testing.assert_close(outputs[2][rows], outputs[0][rows])
            torch.testing.assert_close(outputs[3][rows], outputs[0][rows])
            continue
        positions = np.arange(context)
        text = cache.numpy()[metadata.block_table[r].numpy()[positions // BLOCK], :, positions % BLOCK]
        for head in range(HEADS):
            if selected.kept is None:
                length = int(selected.metadata.seq_lens[r])
                assert length <= rule.budget
                blocks = selected.metadata.block_table[r].numpy()[np.arange(length) // BLOCK]
                read = cache.numpy()[blocks, :, np.arange(length) % BLOCK]
            else:
                read = text[[p for p in selected.kept[r, head // 2].tolist() if p < context]]
            assert len(read) < context
            last = -(-context // 32) - rule.window.budget // 32  # the first page and the latest ones
            window = text[(positions < 32) | (positions // 32 > last)]
            for output, tokens in ((outputs[2], read), (outputs[3], window)):
                _, expected = reference.attention(
                    query[STARTS[r]].numpy(), tokens[..., :SIZE], tokens[..., SIZE:], SIZE**-0.5
                )
                np.testing.assert_allclose(output[STARTS[r], head].numpy(), expected[head], atol=2e-5)


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_selection_layers_can_attend_to_what_they_select(
    flash: Any, monkeypatch: pytest.MonkeyPatch, granularity: Granularity
) -> None:
    from vllm.v1.attention.backends import flash_attn

    from pilotfish.integrations.vllm.attention.sparse import common

    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", paged_attention)
    monkeypatch.setattr(common, "reduce_over_ranks", lambda scores, rule: None)  # single rank
    outputs = []
    rule = SelectionRule(160, 4, 32, "max", granularity)
    impl, metadata, query, cache = build(flash, rule, full_selection=False)
    for index in range(3):  # full attention, selection, sparse: all with the same queries and keys
        impl._index = index
        layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1), _q_scale=torch.ones(1))
        outputs.append(impl.forward(layer, query, query, query, cache, metadata, torch.zeros_like(query)))
    assert torch.equal(outputs[1], outputs[2])
    sparse = [STARTS[r] for r, n in enumerate(CONTEXTS) if QUERIES[r] == 1 and n > rule.budget]
    differs = (outputs[1] != outputs[0]).any(-1).any(-1).nonzero().flatten().tolist()
    assert differs == sparse


def test_update_block_table_builds_a_new_step(flash: Any) -> None:
    _, metadata, _, _ = build(flash, SelectionRule(160, 4, 32, "sum", "page"))
    builder: Any = object.__new__(flash.SparseFlashMetadataBuilder)
    plan = metadata.step.plan
    vars(builder).update(plan=plan, _compilation_config=EAGER, _longest=512, announce=lambda context: None)
    other = metadata.block_table + 1
    updated = builder.update_block_table(metadata, other, metadata.slot_mapping)
    assert updated.step is not metadata.step
    assert torch.equal(updated.step.batch.block_table, other)
    assert updated.step.selected is None
