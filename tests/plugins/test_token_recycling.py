"""Tests of the Token Recycling drafter without an engine, with a toy model whose next token is known."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.config import ConfigError
from pilotfish.plugins.contracts import ROOT, Candidates, DraftBudget, DraftRequest, Engine, Unsupported
from pilotfish.plugins.drafting.draft_length import StepCostModel, allocate_draft_tokens
from pilotfish.plugins.token_recycling import TokenRecycling
from pilotfish.plugins.token_recycling import TokenRecyclingOptions as Options

VOCAB, K = 50, 4
ENGINE = Engine("toy", VOCAB, 512, 8, 6)
Model = np.ndarray  # [vocab, K] top-k candidates after each token; the first one is the greedy token


def model(seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(VOCAB)[:K] for _ in range(VOCAB)]).astype(np.int32)


def options(**values) -> Options:
    return Options(**{"k": K, "order": 3, "bits": 10, **values})


def decode(
    drafter: TokenRecycling, next_tokens: Model, prompt: list[int], length: int, request: str = "r"
) -> tuple[list[int], int]:
    """Decode greedily with chain verification as in the engine, and return the text and the number of steps."""
    cost, text, steps = StepCostModel(0.01), list(prompt), 0
    probs = np.tile(np.array([0.7, 0.2, 0.07, 0.03], np.float32), (32, 1))
    draft: list[int] = []
    drafter.start(request, np.array(prompt, np.int32))
    while len(text) < len(prompt) + length:
        inputs = np.array([text[-1], *draft], np.int32)
        model_tokens = next_tokens[inputs, 0].tolist()
        num_accepted = 0
        while num_accepted < len(draft) and draft[num_accepted] == model_tokens[num_accepted]:
            num_accepted += 1
        tokens, n = model_tokens[: num_accepted + 1], len(inputs)
        context = np.array(text[-9:-1], np.int32)
        parents = np.arange(ROOT, n - 1, dtype=np.int32)
        drafter.observe(
            request, np.array(tokens, np.int32), Candidates(context, inputs, parents, next_tokens[inputs], probs[:n])
        )
        text += tokens
        steps += 1
        remaining = len(prompt) + length - len(text) - 1
        tree = drafter.propose(
            [DraftRequest(request, np.array(text, np.int32), max(0, remaining))], DraftBudget(24, 6)
        )[0]
        assert len(tree) <= 24
        path = tree.best_path()
        assert len(path) <= max(0, min(6, remaining))
        draft = tree.tokens[path[: allocate_draft_tokens([tree.scores[path]], cost)[0]]].tolist()
    drafter.finish(request)
    return text, steps


def greedy_decode(next_tokens: Model, prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    for _ in range(length):
        text.append(int(next_tokens[text[-1], 0]))
    return text


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), st.integers(1, 60))
def test_output_matches_greedy_decoding(seed: int, prompt: list[int], length: int) -> None:
    text, _ = decode(TokenRecycling(options(), ENGINE), model(seed), prompt, length)
    assert text == greedy_decode(model(seed), prompt, length)


def test_repetitive_text_takes_few_steps() -> None:
    _, steps = decode(TokenRecycling(options(), ENGINE), model(1), [3], 200)
    assert steps < 60


def test_rejected_drafts_cost_little() -> None:
    """Test that drafting for random text soon becomes so short that decoding costs at most 3 % more."""
    rng, drafter, cost = np.random.default_rng(0), TokenRecycling(options(), ENGINE), StepCostModel(0.03)
    text = rng.integers(0, VOCAB, 5).tolist()
    drafter.start("r", np.array(text, np.int32))
    spent, emitted, draft = 0.0, 0, []
    for step in range(600):
        inputs = np.array([text[-1], *draft], np.int32)
        model_tokens = rng.integers(0, VOCAB, len(inputs)).tolist()
        num_accepted = 0
        while num_accepted < len(draft) and draft[num_accepted] == model_tokens[num_accepted]:
            num_accepted += 1
        ids = np.stack([rng.permutation(VOCAB)[:K] for _ in inputs]).astype(np.int32)
        parents = np.arange(ROOT, len(inputs) - 1, dtype=np.int32)
        candidates = Candidates(
            np.array(text[-9:-1], np.int32), inputs, parents, ids, np.full(ids.shape, 0.25, np.float32)
        )
        drafter.observe("r", np.array(model_tokens[: num_accepted + 1], np.int32), candidates)
        text += model_tokens[: num_accepted + 1]
        if step >= 100:
            spent, emitted = spent + float(cost(1, len(inputs) - 1)), emitted + num_accepted + 1
        tree = drafter.propose([DraftRequest("r", np.array(text, np.int32), 6)], DraftBudget(24, 6))[0]
        path = tree.best_path()
        draft = tree.tokens[path[: allocate_draft_tokens([tree.scores[path]], cost)[0]]].tolist()
    assert spent / emitted < 1.03 * float(cost(1, 0))


def test_warm_table_helps_another_request() -> None:
    drafter = TokenRecycling(options(), ENGINE)
    _, cold_steps = decode(drafter, model(2), [3], 30)
    _, warm_steps = decode(drafter, model(2), [3], 30)
    assert warm_steps < cold_steps


def test_prompt_that_contains_the_answer_is_copied() -> None:
    answer = greedy_decode(model(4), [9], 20)
    primed = decode(TokenRecycling(options(), ENGINE), model(4), [*answer, 9], 20)[1]
    unprimed = decode(TokenRecycling(options(prime=False), ENGINE), model(4), [*answer, 9], 20)[1]
    assert primed < unprimed


def test_drafts_are_deterministic() -> None:
    assert decode(TokenRecycling(options(), ENGINE), model(5), [1, 2], 50) == decode(
        TokenRecycling(options(), ENGINE), model(5), [1, 2], 50
    )


def test_candidates_of_rejected_tokens_are_stored() -> None:
    drafter = TokenRecycling(options(order=1), ENGINE)
    drafter.start("r", np.array([1], np.int32))
    ids = np.array([[2, 3, 4, 5], [30, 31, 32, 33]], np.int32)
    # Row 1 is the draft token 20, which was rejected in favour of token 2.
    candidates = Candidates(
        np.empty(0, np.int32),
        np.array([1, 20], np.int32),
        np.array([-1, 0], np.int32),
        ids,
        np.full((2, K), 0.25, np.float32),
    )
    drafter.observe("r", np.array([2], np.int32), candidates)
    tree = drafter.propose([DraftRequest("r", np.array([20], np.int32), 5)], DraftBudget(8, 1))[0]
    assert set(tree.tokens.tolist()) == {30, 31, 32, 33}


class TestTables:
    def prompt(self) -> np.ndarray:
        return np.arange(10, dtype=np.int32)

    def drafts(self, drafter: TokenRecycling, request: str) -> int:
        return len(drafter.propose([DraftRequest(request, self.prompt()[:5], 5)], DraftBudget(8, 4))[0])

    def test_table_is_shared_by_default(self) -> None:
        drafter = TokenRecycling(options(), ENGINE)
        drafter.start("a", self.prompt())
        drafter.start("b", self.prompt()[:1])
        assert self.drafts(drafter, "b") > 0
        assert drafter.stats()["tables"] == 1

    def test_tenant_reads_only_its_own_table(self) -> None:
        drafter = TokenRecycling(options(share="tenant"), ENGINE)
        drafter.start("a", self.prompt(), "one")
        drafter.start("b", self.prompt()[:1], "two")
        drafter.start("c", self.prompt()[:1], "one")
        drafter.start("d", self.prompt()[:1])  # without a tenant: its table is not shared
        assert [self.drafts(drafter, r) > 0 for r in "abcd"] == [True, False, True, False]
        drafter.finish("d")
        assert drafter.stats() == {"tables": 2, "bytes": drafter.stats()["bytes"], "requests": 3}

    def test_tables_per_request_are_freed(self) -> None:
        drafter = TokenRecycling(options(share="request"), ENGINE)
        for r in "ab":
            drafter.start(r, self.prompt() if r == "a" else self.prompt()[:1])
        assert self.drafts(drafter, "b") == 0
        for r in "ab":
            drafter.finish(r)
        assert drafter.stats()["tables"] == drafter.stats()["requests"] == 0

    def test_tables_are_bounded_and_tables_in_use_are_kept(self) -> None:
        drafter = TokenRecycling(options(share="tenant", max_tables=2), ENGINE)
        drafter.start("busy", self.prompt(), "kept")
        for i in range(10):
            drafter.start(f"r{i}", self.prompt(), f"tenant {i}")
            drafter.finish(f"r{i}")
        assert drafter.stats()["tables"] == 2
        assert self.drafts(drafter, "busy") > 0

    def test_tables_above_the_bound_are_freed_when_requests_finish(self) -> None:
        drafter = TokenRecycling(options(share="tenant", max_tables=2), ENGINE)
        for i in range(6):
            drafter.start(f"r{i}", self.prompt(), f"tenant {i}")
        assert drafter.stats()["tables"] == 6
        for i in range(6):
            drafter.finish(f"r{i}")
        assert drafter.stats()["tables"] <= 2

    def test_finish_ignores_unknown_requests(self) -> None:
        drafter = TokenRecycling(options(), ENGINE)
        drafter.finish("nobody")
        drafter.start("a", self.prompt())
        drafter.finish("a")
        drafter.finish("a")
        assert drafter.stats()["requests"] == 0


class TestState:
    def trained(self, **values) -> TokenRecycling:
        drafter = TokenRecycling(options(**values), ENGINE)
        decode(drafter, model(7), [3], 40)
        return drafter

    def test_state_file_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "state.npz"
        before = self.trained()
        before.save(path)
        after = TokenRecycling(options(state_path=str(path)), ENGINE)
        assert decode(after, model(7), [3], 40) == decode(before, model(7), [3], 40)
        assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]

    @pytest.mark.parametrize("changed", [{"k": 3}, {"order": 2}, {"bits": 11}])
    def test_refuses_state_of_another_shape(self, tmp_path: Path, changed: dict) -> None:
        path = tmp_path / "state.npz"
        self.trained().save(path)
        with pytest.raises(ConfigError, match=r"written with .*; remove the file, or name another one"):
            TokenRecycling.check(options(state_path=str(path), **changed), ENGINE)

    def test_old_temporary_files_are_removed(self, tmp_path: Path) -> None:
        for name, age in ((".state.npz.abc", 100), (".state.npz.def", 0), (".other.npz.abc", 100)):
            (tmp_path / name).write_bytes(b"half")
            then = time.time() - age
            os.utime(tmp_path / name, (then, then))
        self.trained().save(tmp_path / "state.npz")
        assert sorted(p.name for p in tmp_path.iterdir()) == [".other.npz.abc", ".state.npz.def", "state.npz"]

    def test_refuses_state_of_another_vocabulary(self, tmp_path: Path) -> None:
        path = tmp_path / "state.npz"
        self.trained().save(path)
        other = Engine("other", VOCAB + 1, 512, 8, 6)
        with pytest.raises(ConfigError, match="vocab_size=50, this engine has 51"):
            TokenRecycling.check(options(state_path=str(path)), other)

    @pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
    def test_refuses_invalid_state_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "state.npz"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable state file"):
            TokenRecycling.check(options(state_path=str(path)), ENGINE)

    def test_refuses_truncated_state_file(self, tmp_path: Path) -> None:
        path = tmp_path / "state.npz"
        self.trained().save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="not a readable state file"):
            TokenRecycling.check(options(state_path=str(path)), ENGINE)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda a: a.pop("tokens"),
            lambda a: a.update(tokens=a["tokens"][:-1]),
            lambda a: a.update(tokens=a["tokens"].astype(np.int64)),
            lambda a: a["tokens"].__setitem__((0, 0), VOCAB),
            lambda a: a["tokens"].__setitem__((0, 0), -2),
            lambda a: a["confidence"].__setitem__((0, 0), 200),
            lambda a: a["rate"].__setitem__((1, 0, 0), np.nan),
        ],
    )
    def test_refuses_arrays_that_compiled_code_cannot_read_safely(self, tmp_path: Path, damage) -> None:
        path = tmp_path / "state.npz"
        self.trained().save(path)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        damage(arrays)
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=r"damaged, .*; remove the file"):
            TokenRecycling.check(options(state_path=str(path)), ENGINE)

    def test_checking_a_state_file_does_not_import_numba(self, tmp_path: Path) -> None:
        """Test that checking a state file does not import Numba.

        The front-end process of vLLM 0.32 must not import it before a CPU engine starts in that process.
        """
        path = tmp_path / "state.npz"
        self.trained().save(path)
        code = (
            "import sys\n"
            "from pilotfish.plugins.contracts import Engine\n"
            "from pilotfish.plugins.token_recycling import TokenRecycling, TokenRecyclingOptions\n"
            f"options = TokenRecyclingOptions(k={K}, order=3, bits=10, state_path={str(path)!r})\n"
            f"TokenRecycling.check(options, Engine('toy', {VOCAB}, 512, 8, 6))\n"
            "assert 'numba' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_refuses_missing_state_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="not a folder that can be written"):
            TokenRecycling.check(options(state_path=str(tmp_path / "no" / "state.npz")), ENGINE)

    def test_readers_never_read_a_partial_state_file(self, tmp_path: Path) -> None:
        path = tmp_path / "state.npz"
        drafter = self.trained()
        drafter.save(path)
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                drafter.save(path)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(50):
                TokenRecycling.check(options(state_path=str(path)), ENGINE)
        finally:
            stop.set()
            writer.join()
        assert len(list(tmp_path.iterdir())) == 1

    def test_failed_save_keeps_the_old_state_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "state.npz"
        drafter = self.trained()
        drafter.save(path)
        before = path.read_bytes()
        monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            drafter.save(path)
        assert path.read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1


def test_token_ids_outside_the_vocabulary_are_ignored() -> None:
    drafter = TokenRecycling(options(), ENGINE)
    odd = np.array([3, VOCAB + 1000, -5, 2**31 - 1, 7, VOCAB + 1000], np.int32)
    drafter.start("r", odd)
    ids, probs = np.array([[1, 2, 3, 4]] * 2, np.int32), np.full((2, K), 0.25, np.float32)
    drafter.observe("r", odd[:2], Candidates(odd[:4], odd[1:3], np.array([-1, 0], np.int32), ids, probs))
    (tree,) = drafter.propose([DraftRequest("r", odd, 5)], DraftBudget(8, 4))
    assert len(tree) <= 8


def test_refuses_options_out_of_range() -> None:
    bad: dict[str, Any]
    for bad in ({"k": 0}, {"order": 9}, {"bits": 40}, {"max_tables": 0}):
        with pytest.raises(ValueError, match="expected"):
            Options(**bad)
    with pytest.raises(ValueError, match="state_path"):
        Options(share="tenant", state_path="x")


def test_refuses_vocabulary_smaller_than_k() -> None:
    with pytest.raises(Unsupported, match="lower k"):
        TokenRecycling.check(Options(), Engine("tiny", 4, 8, 1))


def test_memory_per_table_is_small() -> None:
    drafter = TokenRecycling(Options(), Engine("smollm2", 49_152, 8192, 8, 12))
    drafter.start("r", np.zeros(1, np.int32))
    assert drafter.stats()["bytes"] < 6 * 2**20
