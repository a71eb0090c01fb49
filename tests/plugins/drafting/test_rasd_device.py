"""Tests of RASD on a device: the chains and the counts against a naive implementation, and the sources."""

import importlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ahead_of_time import compiled_kernels
from device_wait import no_device_wait
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import DeviceBatch, DeviceLimits, Engine, Unsupported
from pilotfish.plugins.drafting import acceptance_counts as counts
from pilotfish.plugins.drafting.datastore import build_datastore
from pilotfish.plugins.rasd import RASD
from pilotfish.plugins.rasd import RASDOptions as Options

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value", "ignore:divide by zero"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, MAX_NUM_REQS, STEPS, LENGTH = 20, 3, 3, 64
ENGINE = Engine("toy", VOCAB, LENGTH, MAX_NUM_REQS, STEPS)
LIMITS = DeviceLimits(DEVICE, MAX_NUM_REQS, STEPS, LENGTH)
fast = settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
few = st.integers(0, 3)


@pytest.fixture(scope="module", autouse=True)
def module(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.plugins.drafting.rasd_device")


def make(**options: Any) -> Any:
    return RASD.device_drafter(Options(**{"outputs": 64, "max_occurrences": 4, **options}), ENGINE, LIMITS)


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32, device=DEVICE)


class Texts:
    """The texts of an engine's requests, whose steps sample one token or accept some."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}

    def batch(self, sampled: dict[int, list[int]]) -> DeviceBatch:
        """Append the sampled tokens, and return the step of these requests; each has one row of logits."""
        rows = torch.zeros(MAX_NUM_REQS, LENGTH, dtype=torch.int32)
        lengths = torch.zeros(MAX_NUM_REQS, dtype=torch.int32)
        for req_idx, tokens in sampled.items():
            self.texts[req_idx] += tokens
        for req_idx, text in self.texts.items():
            rows[req_idx, : len(text)], lengths[req_idx] = torch.tensor(text, dtype=torch.int32), len(text)
        indices = list(sampled)
        last = [self.texts[i][-1] for i in indices]
        return DeviceBatch(
            num_requests=len(indices),
            max_num_logits=STEPS + 1,
            idx_mapping=torch.tensor(indices, device=DEVICE),
            all_token_ids=rows.to(DEVICE),
            total_len=lengths.to(DEVICE),
            num_sampled=ids(*[len(t) for t in sampled.values()]),
            cu_num_logits=ids(*range(len(indices) + 1)),
            input_ids=ids(*last),
            positions=torch.tensor([len(self.texts[i]) - 1 for i in indices], device=DEVICE),
            candidate_ids=torch.tensor([[(t + 1) % VOCAB, 18, 19, *range(5, 10)] for t in last], device=DEVICE),
            candidate_probs=torch.tensor([[0.7, 0.2, 0.1, *[0.0] * 5]] * len(last), device=DEVICE),
        )

    def row(self, req_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = self.texts[req_idx]
        return ids(*text, *[0] * (LENGTH - len(text))), ids(len(text))


def acceptance_rate(seen: Any, right: Any, cell: tuple[int, int, int, int]) -> float:
    prior = right[*cell[:3], counts.ANY] / seen[*cell[:3], counts.ANY]
    return float((right[cell] + counts.FEEDBACK_PRIOR * prior) / (seen[cell] + counts.FEEDBACK_PRIOR))


def continuations(text: list[int], longest: int, most: int) -> tuple[int, list[list[int]]]:
    """Return the longest match of a text's end in the text, and the newest continuations of that length."""

    def match(end: int) -> int:
        n = 0
        while n < min(longest, end + 1) and text[end - n] == text[len(text) - 1 - n]:
            n += 1
        return n

    found = [(match(end), end) for end in range(len(text) - 1)]
    best = max((n for n, _ in found), default=0)
    if best < 2:
        return 0, []
    ends = [end for n, end in found if n == best][::-1][:most]
    return best, [text[end + 1 :][:STEPS] for end in ends]


def naive_chain(
    text: list[int], options: Options, seen: Any, right: Any
) -> tuple[list[int], list[float], list[tuple[int, Any]]]:
    """Return the chain from the text alone, its scores, and the predicted token and its cell at each depth."""
    matched, rows = continuations(text, options.max_match, options.max_occurrences)
    chain, scores, predictions, score = [], [], [], 1.0
    for depth in range(STEPS):
        before = len(rows)
        rows = [row for row in rows if len(row) > depth]
        votes = [sum(row[depth] == other[depth] for other in rows) for row in rows]
        token = text[-1]
        if votes:
            token = rows[int(np.argmax(votes))][depth]
            length_bin = int(np.searchsorted(counts.LENGTHS, matched + depth, side="right"))
            share_bin = int(np.count_nonzero(np.float32(max(votes) / before) < counts.SHARES))
            cell = (0, length_bin, share_bin, counts.UNKNOWN)
            score *= acceptance_rate(seen, right, cell)
            predictions.append((token, cell))
        if not votes or score < options.prune:
            score = 0.0
            token = text[-1]
        chain.append(token)
        scores.append(score)
        rows = [row for row in rows if row[depth] == token]
    return chain, scores, predictions


@fast
@given(
    st.lists(few, min_size=1, max_size=16),
    st.lists(st.lists(few, min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from([0.02, 0.4]),
)
def test_chains_and_counts_are_those_of_a_naive_implementation(
    prompt: list[int], sampled: list[list[int]], prune: float
) -> None:
    drafter, texts = make(base="none", outputs=0, prune=prune), Texts()
    texts.texts[1] = list(prompt)
    drafter.start(1, ids(*prompt))
    seen, right = counts.make_acceptance_counts(1)
    predictions: list[tuple[int, Any]] = []
    chain: list[int] = []
    for tokens in sampled:
        batch = texts.batch({1: tokens})
        drafter.observe(batch)
        for depth, (predicted, cell) in enumerate(predictions[: len(tokens)]):
            if chain[:depth] == tokens[:depth]:
                for at in (cell, (*cell[:3], counts.ANY)):
                    seen[at] += 1
                    right[at] += predicted == tokens[depth]
        np.testing.assert_array_equal(drafter._num_verified.cpu(), seen)
        np.testing.assert_array_equal(drafter._num_accepted.cpu(), right)
        drafted = drafter.propose(batch)[0].tolist()
        chain, scores, predictions = naive_chain(texts.texts[1], drafter.options, seen, right)
        assert drafted == chain
        np.testing.assert_allclose(drafter.scores[0].cpu(), scores, rtol=1e-5)


def drafts(drafter: Any, texts: Texts, req_idx: int, tokens: list[int]) -> list[int]:
    batch = texts.batch({req_idx: tokens})
    drafter.observe(batch)
    return drafter.propose(batch)[0].tolist()


def test_outputs_of_finished_requests_are_a_source() -> None:
    drafter, texts = make(base="none", request=False), Texts()
    texts.texts[0] = [1, 2]
    drafter.start(0, ids(1, 2))
    drafts(drafter, texts, 0, [5, 6, 7, 8])
    drafter.finish(0, *texts.row(0))
    del texts.texts[0]
    texts.texts[2] = [3]
    drafter.start(2, ids(3))
    assert drafts(drafter, texts, 2, [5, 6]) == [7, 8, 6]  # then the output ends


def test_the_base_drafter_drafts_where_nothing_is_retrieved_and_after_it() -> None:
    drafter, texts = make(), Texts()
    texts.texts[0] = [2, 3]
    drafter.start(0, ids(2, 3))
    # Each step's candidates are the next numbers.
    assert drafts(drafter, texts, 0, [4])[0] == 5
    drafter.finish(0, *texts.row(0))
    texts.texts[1] = [9, 11, 4, 9, 11]
    drafter.start(1, ids(9, 11, 4, 9, 11))
    drafted = drafts(drafter, texts, 1, [4])
    assert drafted == [9, 11, 4]
    assert all(0 <= t < VOCAB for t in drafted)


def test_a_datastore_is_a_source(tmp_path: Path) -> None:
    build_datastore(tmp_path / "store", [[1, 2, 3, 4, 5], [1, 2, 6, 7, 8]], "toy", "0", 100)
    drafter, texts = make(base="none", request=False, outputs=0, datastore=str(tmp_path / "store")), Texts()
    assert drafter.nbytes > 12 * 8
    texts.texts[0] = [9, 1]
    drafter.start(0, ids(9, 1))
    assert drafts(drafter, texts, 0, [2])[0] in (3, 6)
    assert drafts(drafter, texts, 0, [6]) == [7, 8, 6]  # then the text ends


def test_a_tree_has_the_retrieved_chain_and_tokens_of_the_base_drafter_beside_it() -> None:
    steps = 8
    limits = DeviceLimits(DEVICE, MAX_NUM_REQS, steps, LENGTH, trees=True)
    drafter, texts = RASD.device_drafter(Options(outputs=64), ENGINE, limits), Texts()
    assert drafter is not None
    prompt = [9, 11, 4, 6, 9, 11, 12, 6, 9, 11]
    texts.texts[0] = list(prompt)
    drafter.start(0, ids(*prompt))
    batch = texts.batch({0: [4]})
    rows = len(batch.input_ids)
    trees = {
        "parents": torch.full((rows,), -1, dtype=torch.int32, device=DEVICE),
        "accepted": torch.ones(rows, dtype=torch.bool, device=DEVICE),
        "chain_only": torch.zeros(MAX_NUM_REQS, dtype=torch.bool, device=DEVICE),
    }
    batch = replace(batch, **trees)
    with no_device_wait():
        drafter.observe(batch)
        tokens = drafter.propose(batch)
    assert drafter.parents is not None and drafter.scores is not None
    nodes = list(zip(tokens[0].tolist(), drafter.parents[0].tolist(), strict=True))
    paths: list[list[int]] = []
    for token, parent in nodes:
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    assert [6, 9, 11] in paths  # what followed the last 9, 11, 4
    assert [5] in paths  # the model's most probable token after 4, at this step
    batch.chain_only.fill_(True)  # type: ignore[union-attr]
    assert drafter.propose(batch)[0, :3].tolist() == [6, 9, 11]
    assert drafter.parents[0].tolist() == list(range(-1, steps - 1))


def test_predictions_are_forgotten_where_no_draft_was_made() -> None:
    drafter, texts = make(base="none"), Texts()
    prompt = [1, 2, 3, 4, 1, 2]
    texts.texts[0] = list(prompt)
    drafter.start(0, ids(*prompt))
    assert drafts(drafter, texts, 0, [3]) == [4, 1, 2]
    before = drafter._num_verified.clone()
    drafter.observe(texts.batch({0: [4]}))  # the prediction of 4 is counted
    counted = drafter._num_verified.clone()
    assert not torch.equal(counted, before)
    drafter.observe(texts.batch({0: [1]}))
    drafter.observe(texts.batch({0: [2]}))
    assert torch.equal(drafter._num_verified, counted)


def test_a_better_base_token_replaces_a_retrieved_one() -> None:
    drafter, texts = make(outputs=0), Texts()
    prompt = [1, 2, 11, 1, 2, 12, 1, 2, 13, 1, 2, 14, 1]
    texts.texts[0] = list(prompt)
    drafter.start(0, ids(*prompt))
    drafter._base.tables._rate.fill_(0.97)  # the counts of the base drafter's tokens decide
    drafter._num_accepted.copy_(drafter._num_verified)
    drafter._num_accepted[0].zero_()
    assert drafts(drafter, texts, 0, [2])[0] == 3, "the model's most probable token after 2"


def test_no_wait_for_the_device() -> None:
    drafter, texts = make(), Texts()
    for i in range(2):
        texts.texts[i] = [1, 2, 3, 1]
    rows = {i: texts.row(i) for i in range(2)}
    first, second = texts.batch({0: [2], 1: [2]}), texts.batch({0: [3, 1], 1: [3]})
    prompt = ids(1, 2, 3, 1)
    with no_device_wait():
        drafter.start(0, prompt)
        drafter.start(1, prompt)
        for batch in (first, second):
            drafter.observe(batch)
            drafter.propose(batch)
        drafter.finish(0, *rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "engine"}, "base=engine is not supported on the V2 model runner"),
        ({"outputs": 1 << 23}, "set outputs to 4194304 or less"),
        ({"max_occurrences": 100}, "set max_occurrences to 64 or less"),
        ({"fuse": False}, "fuse=false with verification=tree is not supported on the V2 model runner"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        RASD.check_device(Options(**options), ENGINE, trees=True)


def test_chains_without_fusion_are_supported() -> None:
    RASD.check_device(Options(fuse=False), ENGINE)


def test_memory_is_reported() -> None:
    assert make(base="none", outputs=1 << 16).nbytes - make(base="none", outputs=1 << 15).nbytes >= 4 << 15


def test_large_counts_are_halved_from_time_to_time(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALVE_INTERVAL", 2)
    drafter, texts = make(base="none"), Texts()
    texts.texts[0] = [1, 2, 3]
    drafter.start(0, ids(1, 2, 3))
    batch = texts.batch({0: [4]})
    large, small = (0, 0, 0, counts.ANY), (0, 1, 0, counts.ANY)
    drafter._num_verified[large], drafter._num_verified[small] = float(counts.MAX_COUNT), counts.MAX_COUNT - 1.0
    drafter._num_accepted[large], drafter._num_accepted[small] = 500.0, 500.0
    found = []
    for _ in range(2):
        drafter.propose(batch)
        drafter.observe(batch)
        found.append([(drafter._num_verified[at].item(), drafter._num_accepted[at].item()) for at in (large, small)])
    assert found == [[(1000.0, 500.0), (999.0, 500.0)], [(500.0, 250.0), (999.0, 500.0)]]


AHEAD_OF_TIME = """
import torch
from ahead_of_time import compiled_launches
from pilotfish.plugins.drafting import rasd_device
from test_rasd_device import ENGINE, Texts, ids, make

rasd_device.HALVE_INTERVAL = 1
with compiled_launches() as sizes:
    drafter, texts = make(), Texts()
    texts.texts[0] = [1, 2, 3]
    drafter.start(0, ids(1, 2, 3))
    batch = texts.batch({0: [4]})
    drafter.propose(batch)
    drafter.observe(batch)
    drafter.propose(batch)
    drafter.finish(0, *texts.row(0))
print(sorted(sizes))
"""


def test_kernels_compile_for_a_gpu() -> None:
    compiled = compiled_kernels(AHEAD_OF_TIME, Path(__file__).parent)
    from pilotfish.plugins.drafting import fusion_triton, history_triton

    kernels = {n for module in (fusion_triton, history_triton) for n in vars(module) if n.endswith("_kernel")}
    assert kernels <= set(compiled)
