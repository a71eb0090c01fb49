"""Tests of RASD on repeated texts without an engine, with and without a base drafter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilotfish.plugins.config import ConfigError, Selection
from pilotfish.plugins.contracts import Candidates, DraftBudget, DraftRequest, DraftTree, Engine
from pilotfish.plugins.drafting import datastore
from pilotfish.plugins.drafting.draft_model_drafter import DraftModelDrafter
from pilotfish.plugins.manager import plugins
from pilotfish.plugins.rasd import RASD, RASDOptions

ENGINE = Engine("m", vocab_size=1000, max_model_len=2048, max_num_seqs=4, num_speculative_tokens=24)
BUDGET = DraftBudget(64, 24)


def candidates_after(text: list[int], new: list[int]) -> Candidates:
    """Return the candidates of a step without draft tokens after ``text``; the first one is ``new[0]``."""
    return Candidates(
        np.array(text[-9:-1], np.int32),
        np.array(text[-1:], np.int32),
        np.array([-1], np.int32),
        np.array([new[:1] + [-1] * 7], np.int32),
        np.full((1, 8), 0.125, np.float32),
    )


def step(drafter: RASD, request: str, text: list[int], new: list[int]) -> DraftTree:
    """Observe the accepted tokens ``new``, and return the next draft."""
    drafter.observe(request, np.array(new, np.int32), candidates_after(text, new))
    text += new
    return drafter.propose([DraftRequest(request, np.array(text, np.int32), 24)], BUDGET)[0]


def run_request(drafter: RASD, request: str, prompt: list[int], output: list[int]) -> int:
    """Run a request that accepts matching tokens of each best path, and return the number of steps."""
    drafter.start(request, np.array(prompt, np.int32))
    text, done, steps = list(prompt), 0, 0
    draft: list[int] = []
    while done < len(output):
        accepted = 0
        while accepted < len(draft) and done + accepted < len(output) and draft[accepted] == output[done + accepted]:
            accepted += 1
        new = output[done : done + accepted + 1]
        done, steps = done + len(new), steps + 1
        tree = step(drafter, request, text, new)
        draft = tree.tokens[tree.best_path()].tolist()
    drafter.finish(request)
    return steps


@pytest.mark.parametrize("base", ["none", "token_recycling"])
def test_repeated_output_takes_few_steps(base: str) -> None:
    rng = np.random.default_rng(0)
    drafter = RASD(RASDOptions(base=base), ENGINE)
    prompts = [rng.integers(0, 1000, 40).tolist() for _ in range(5)]
    outputs = [rng.integers(0, 1000, 120).tolist() for _ in range(5)]
    first = [run_request(drafter, f"a{i}", p, o) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    again = [run_request(drafter, f"b{i}", p, o) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    assert min(first) > 80
    assert max(again) < 40
    assert drafter.stats()["requests"] == 0
    assert drafter.stats()["outputs"] > 1000


def test_copied_prompt_takes_few_steps() -> None:
    rng = np.random.default_rng(0)
    drafter, passage = RASD(RASDOptions(outputs=0), ENGINE), rng.integers(0, 1000, 150).tolist()
    assert run_request(drafter, "a", [*passage, 1, 2, 3], passage) < 60
    assert run_request(RASD(RASDOptions(base="none", outputs=0, datastore=None), ENGINE), "a", [1], passage) == 150


def test_drafts_are_retrieved_from_datastore(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 1000, 200).tolist() for _ in range(20)]
    datastore.build_datastore(tmp_path / "store", texts, "tokens", "0", 1 << 20)
    options = RASDOptions(base="none", request=False, outputs=0, datastore=str(tmp_path / "store"))
    RASD.check(options, ENGINE)
    drafter = RASD(options, ENGINE)
    assert run_request(drafter, "a", [5], texts[3]) < 60
    with pytest.raises(ValueError, match="beyond the vocabulary of 500"):
        RASD.check(options, Engine("m", 500, 2048, 4))


def test_without_fusion_base_drafter_is_only_a_fallback() -> None:
    text = [1, 2, 3, 4, 5, 1, 9, 1, 2]
    plain: dict[str, Any] = {"outputs": 0, "base_feedback": False, "prune": 0.0}
    trees = {}
    arms: dict[str, dict[str, Any]] = {"fused": {}, "apart": {"fuse": False}, "alone": {"base": "none"}}
    for name, options in arms.items():
        drafter = RASD(RASDOptions(**plain, **options), ENGINE)
        drafter.start("a", np.array(text, np.int32))
        trees[name] = step(drafter, "a", list(text), [3])
        drafter.observe("a", np.array([777], np.int32), candidates_after([*text, 3], [777]))
        nothing = drafter.propose([DraftRequest("a", np.array([*text, 3, 777, 1], np.int32), 24)], BUDGET)[0]
        assert bool(len(nothing)) == (name != "alone")
    assert trees["alone"].tokens[0] == 4
    assert trees["apart"].tokens.tolist() == trees["alone"].tokens.tolist()
    assert len(trees["fused"]) > len(trees["alone"])


def test_drafts_stay_within_budget_and_limit() -> None:
    drafter = RASD(RASDOptions(), ENGINE)
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 20
    drafter.start("a", np.array(text, np.int32))
    for nodes, depth, limit in ((5, 24, 24), (64, 3, 24), (64, 24, 2), (64, 24, 0)):
        request = DraftRequest("a", np.array(text, np.int32), limit)
        tree = drafter.propose([request], DraftBudget(nodes, depth))[0]
        assert len(tree) <= nodes
        assert len(tree.best_path()) <= min(depth, limit)
        assert (len(tree) > 0) == (limit > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 30}, "min_match: expected 2 to 24, got 30"),
        ({"base": "rasd"}, "base: rasd cannot be its own base"),
        ({"request": False, "outputs": 0}, "nothing to retrieve from"),
        ({"prune": 2.0}, "prune: expected 0 to 1"),
        ({"outputz": 1}, "did you mean 'outputs'"),
    ],
)
def test_refuses_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugins().resolve("drafter", Selection("rasd", options))


def test_refuses_wrong_base_or_datastore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'token_recycling'"):
        RASD.check(RASDOptions(base="token_recyclin"), ENGINE)
    with pytest.raises(ConfigError, match=r"pilotfish\.drafter\.datastore: .* not a datastore"):
        RASD.check(RASDOptions(datastore=str(tmp_path)), ENGINE)
    (tmp_path / "datastore.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ConfigError, match="cannot be read"):
        RASD.check(RASDOptions(datastore=str(tmp_path)), ENGINE)


def test_draft_model_scores_follow_acceptance() -> None:
    base = DraftModelDrafter(None, ENGINE)
    text = np.arange(10, dtype=np.int32)
    request = DraftRequest("a", text, 24, np.array([5, 6, 7], np.int32))
    for _ in range(200):  # the first token is right, the second never
        base.propose([request], BUDGET)
        base.observe("a", np.array([5, 9], np.int32), candidates_after([1], [5]))
    tree = base.propose([request], BUDGET)[0]
    assert tree.tokens.tolist() == [5, 6, 7]
    assert tree.scores[0] > 0.95
    assert tree.scores[1] < 0.05
    assert tree.scores[2] <= tree.scores[1]
    assert len(base.propose([DraftRequest("a", text, 1, np.array([5, 6], np.int32))], BUDGET)[0]) == 1


def test_retrieval_extends_the_draft_of_a_draft_model() -> None:
    drafter = RASD(RASDOptions(base="engine", outputs=0), ENGINE)
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    drafter.start("a", np.array(text, np.int32))
    request = DraftRequest("a", np.array(text, np.int32), 24, np.array([3, 4], np.int32))
    tree = drafter.propose([request], BUDGET)[0]
    assert tree.tokens[tree.best_path()].tolist()[:4] == [3, 4, 5, 6]
