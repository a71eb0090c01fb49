"""Tree verification without an engine: positions, moved keys and values, eligible requests, unsupported layers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessors

from pilotfish.integrations.vllm.attention.tree import common
from pilotfish.integrations.vllm.drafting.v1 import tree_verification
from pilotfish.integrations.vllm.drafting.v1.sampling import replace_rejection_sampler
from pilotfish.plugins.contracts import DraftTree, Unsupported

VOCABULARY = 32


class Builder:
    """Fake attention metadata builder that records moved KV entries."""

    error: str | None = None

    def __init__(self) -> None:
        self.scheduled_trees, self.moves = [], []

    def move_kv(self, source, target) -> None:
        self.moves += zip(source, target, strict=True)


def runner_of(requests: dict[str, SamplingParams], starts: list[int], builder: Builder) -> SimpleNamespace:
    """Return a fake model runner with a batch of requests; ``starts`` is its query_start_loc."""
    sampling = SimpleNamespace(
        all_greedy=True,
        no_penalties=True,
        max_num_logprobs=None,
        logprob_token_ids=None,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        thinking_budget_state_holder=None,
    )
    ids = list(requests)
    return SimpleNamespace(
        max_model_len=1024,
        num_spec_tokens=8,
        attn_groups=[[SimpleNamespace(metadata_builders=[builder])]],
        query_start_loc=SimpleNamespace(np=np.array(starts)),
        positions=torch.arange(100, 100 + starts[-1]),
        input_batch=SimpleNamespace(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampling_metadata=sampling
        ),
        requests={r: SimpleNamespace(sampling_params=p) for r, p in requests.items()},
        _prepare_inputs=lambda *_: "prepared",
        sampler=SimpleNamespace(greedy_sample=lambda logits: logits.argmax(-1)),
        _sample=None,
    )


def tree(*nodes: tuple[int, int]) -> DraftTree:
    """Return a draft tree of (token, parent) nodes with equal scores."""
    tokens, parents = zip(*nodes, strict=True)
    return DraftTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.ones(len(nodes), np.float32))


def step(runner: SimpleNamespace, scheduled: dict[str, list[int]], drawn: list[int]) -> list[list[int]]:
    """Run one step in which the model samples ``drawn`` at its query tokens, and return the output tokens."""
    assert runner._prepare_inputs(SimpleNamespace(scheduled_spec_decode_tokens=scheduled)) == "prepared"
    counts = [len(scheduled.get(r, [])) for r in runner.input_batch.req_ids]
    metadata = SimpleNamespace(
        num_draft_tokens=counts,
        draft_token_ids=torch.tensor([t for r in runner.input_batch.req_ids for t in scheduled.get(r, [])]),
    )
    logits = torch.nn.functional.one_hot(torch.tensor(drawn), VOCABULARY).float() * 50
    output = runner._sample(logits, metadata).sampled_token_ids
    return [[t for t in row if t >= 0] for row in output.tolist()]


GREEDY = SamplingParams(temperature=0)
#   root
#   /  \
#  5    6
# / \    \
# 7  8    7
#          \
#           9
TREE = tree((5, -1), (6, -1), (7, 0), (8, 0), (7, 1), (9, 4))


def attached(runner: SimpleNamespace, plugin: str = "drafter") -> tree_verification.TreeVerifier:
    """Return a verifier that is attached to the runner, as the drafter attaches it."""
    verifier = tree_verification.TreeVerifier(runner, plugin)
    verifier.attach()
    replace_rejection_sampler(runner, verifier)
    return verifier


def test_tree_in_a_batch_with_a_chain_and_a_request_without_drafts() -> None:
    builder = Builder()
    runner = runner_of({"a": GREEDY, "b": GREEDY, "c": GREEDY}, [0, 7, 10, 11], builder)
    verifier = attached(runner)
    verifier.set_drafts({"a": TREE, "b": tree((1, -1), (2, 0))})
    drafts = {"a": TREE.tokens.tolist(), "b": [1, 2]}
    out = step(runner, drafts, [6, 0, 7, 0, 0, 9, 3, 1, 4, 0, 11])
    assert out == [[6, 7, 9, 3], [1, 4], [11]]
    assert runner.positions[:7].tolist() == [100, 101, 101, 102, 102, 102, 103]
    assert runner.positions[7:].tolist() == [107, 108, 109, 110]
    assert [(p.index, p.first, p.position) for p in builder.scheduled_trees] == [(0, 0, 100)]
    assert builder.moves == [(2, 1), (5, 2), (6, 3)], (
        "KV of the accepted nodes is moved to the positions after the root"
    )
    assert verifier.num_moved_tokens == 3


def test_truncated_and_unknown_drafts_are_verified() -> None:
    builder = Builder()
    runner = runner_of({"a": GREEDY}, [0, 4], builder)
    verifier = attached(runner)
    verifier.set_drafts({"a": TREE})
    assert step(runner, {"a": [5, 6, 7]}, [5, 7, 0, 12]) == [[5, 7, 12]]
    assert builder.moves == [(3, 2)]
    verifier.set_drafts({})
    assert not builder.moves.clear()
    assert step(runner, {"a": [5, 6, 7]}, [5, 7, 0, 12]) == [[5, 7]], "a draft that is no tree is a chain"
    assert not builder.moves


def test_requests_with_a_grammar_get_chains() -> None:
    grammar = SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(regex="a+"))
    runner = runner_of({"a": SamplingParams(logprobs=1), "b": grammar}, [0, 7, 9], Builder())
    verifier = attached(runner)
    assert verifier.can_verify_tree("a")
    assert not verifier.can_verify_tree("b")


def test_falls_back_to_chains_when_the_kernel_fails(caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder()
    builder.error = "the kernel misreads the cache"
    verifier = tree_verification.TreeVerifier(runner_of({"a": GREEDY}, [0, 7], builder), "rasd")
    with caplog.at_level("WARNING", "vllm.pilotfish"):
        assert not verifier.can_verify_tree("a")
        assert not verifier.can_verify_tree("a")
    assert verifier.builders == []
    runner = runner_of({"a": GREEDY}, [0, 7], builder)
    verifier = attached(runner, "rasd")
    verifier.set_drafts({"a": TREE})
    step(runner, {"a": TREE.tokens.tolist()}, [0] * 7)
    assert runner.positions[:7].tolist() == list(range(100, 107)), "the positions are those of a chain"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"sliding_window": (127, 0)}, "a sliding window"), ({"alibi_slopes": [1.0]}, "ALiBi"), ({"head_size": 72}, "72")],
)
def test_refuses_unsupported_layers(changed: dict, reason: str) -> None:
    plain = {"sliding_window": (-1, -1), "alibi_slopes": None, "logits_soft_cap": None, "sinks": None, "head_size": 64}
    config = SimpleNamespace(
        additional_config={"pilotfish": {"drafter": {"name": "rasd", "verification": "tree"}}},
        model_config=SimpleNamespace(model="some/model"),
    )
    layers = {"layers.0": SimpleNamespace(impl=SimpleNamespace(**plain))}
    common.check_tree_layers(config, layers)
    layers["layers.1"] = SimpleNamespace(impl=SimpleNamespace(**{**plain, **changed}))
    with pytest.raises(Unsupported, match=rf"rasd .*some/model, layer layers\.1: .*{reason}.*verification=chain"):
        common.check_tree_layers(config, layers)
