"""Tests of the training objectives against naive loops, and of interrupted and resumed training."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import RetrievalError
from pilotfish.retrieval.encoders import load_multi_vector_encoder, vdr
from pilotfish.retrieval.training import loop, objectives, pairs, tasks
from pilotfish.retrieval.training.pairs import Pair

LENGTHS = tasks.Lengths(12, 24)
QUIET = settings(max_examples=25, deadline=None)


def nll(scores: np.ndarray) -> float:
    """Return the mean negative log-likelihood of the diagonal, with a softmax along rows."""
    return float(
        np.mean([math.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(scores)])
    )


@QUIET
@given(seed=st.integers(0, 1 << 20), batch=st.integers(2, 5), semi=st.booleans(), mask=st.sampled_from([None, 0.5]))
def test_vdr_loss_matches_naive_computation(seed: int, batch: int, semi: bool, mask: float | None) -> None:
    rng, words, top = np.random.default_rng(seed), 17, 4
    q, p = rng.random((2, batch, words)).astype(np.float32) * 2
    qb, pb = (rng.random((2, batch, words)) < 0.2).astype(np.float32)

    def keep_top(x: np.ndarray, bag: np.ndarray) -> np.ndarray:
        mask_top = np.array([[v in set(np.argsort(-row)[:top]) for v in range(words)] for row in x])
        return np.where(mask_top | (bag > 0), x, 0)

    def masked(bag: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if mask is None:
            return bag, other
        owned = np.array([[v % batch == i and not bag[:, v].any() for v in range(words)] for i in range(batch)])
        norms = np.maximum(np.sqrt(owned.sum(1, keepdims=True)), 1e-12)
        return bag + mask * owned / norms, np.where(owned, 0, other)

    def symmetric_nll(scores: np.ndarray) -> float:
        return nll(scores) + nll(scores.T)

    terms = [symmetric_nll(keep_top(q, qb) @ p.T)]
    bag, other = masked(qb, p)
    terms.append(symmetric_nll(bag @ other.T))
    if semi:
        terms.append(symmetric_nll(q @ keep_top(p, pb).T))
        bag, other = masked(pb, q)
        terms.append(symmetric_nll(other @ bag.T))
    loss = objectives.vdr_loss(*map(torch.from_numpy, (q, p, qb, pb)), top=top, semi=semi, mask_weight=mask)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-4)


@QUIET
@given(seed=st.integers(0, 1 << 20), batch=st.integers(2, 4), retrieved=st.integers(1, 40))
def test_xtr_scores_match_naive_computation(seed: int, batch: int, retrieved: int) -> None:
    rng = np.random.default_rng(seed)
    q, d = rng.normal(size=(batch, 3, 8)).astype(np.float32), rng.normal(size=(batch, 5, 8)).astype(np.float32)
    qm, dm = np.ones((batch, 3), int), np.ones((batch, 5), int)
    qm[0, 2:], dm[1, 3:] = 0, 0
    expected = np.zeros((batch, batch))
    for i in range(batch):
        hits: list[list[float]] = [[] for _ in range(batch)]
        for t in range(3):
            if not qm[i, t]:
                continue
            similarities = [(float(q[i, t] @ d[b, j]), b) for b in range(batch) for j in range(5) if dm[b, j]]
            similarities.sort(reverse=True)
            best: dict[int, float] = {}
            for x, b in similarities[:retrieved]:
                best[b] = max(best.get(b, -9e9), x)
            for b, x in best.items():
                hits[b].append(x)
        expected[i] = [sum(h) / len(h) if h else 0.0 for h in hits]
    scores = objectives.xtr_scores(*map(torch.from_numpy, (q, qm, d, dm)), retrieved=retrieved)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@QUIET
@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.integers(2, 4), st.integers(0, 9))
def test_batches_contain_each_document_once(documents: list[int], size: int, seed: int) -> None:
    given_pairs = [Pair(f"q{i}", f"d{d}") for i, d in enumerate(documents)]
    if len(set(documents)) < size:
        with pytest.raises(RetrievalError, match="too few"):
            next(pairs.pair_batches(given_pairs, size, seed))
        return
    stream = pairs.pair_batches(given_pairs, size, seed)
    again = pairs.pair_batches(given_pairs, size, seed)
    for _ in range(12):
        batch = next(stream)
        assert batch == next(again)
        assert len({p.document for p in batch}) == size


def test_inverse_cloze_pairs_match_sentences_with_their_passages(tmp_path: Path) -> None:
    sentences = [f"This is the sentence number {i} of a long text." for i in range(40)]
    (tmp_path / "a.txt").write_text(" ".join(sentences))
    cloze_pairs = pairs.inverse_cloze_pairs([str(tmp_path / "a.txt")], 0)
    assert len(cloze_pairs) == 8
    inside = sum(p.query in p.document for p in cloze_pairs)
    assert inside < len(cloze_pairs)
    for pair in cloze_pairs:
        number = int(pair.query.split()[5])
        assert any(f"number {n} " in pair.document for n in range(number - 4, number + 5) if n != number)


def training_pairs(count: int = 100) -> list[Pair]:
    rng = np.random.default_rng(0)
    result = []
    for i in range(count):
        words = [f"w{j}" for j in rng.choice(150, 6, replace=False)]
        result.append(Pair(f"{words[0]} {words[1]}", " ".join([*words, f"w{i % 150}"])))
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.encoder(folder / "m")
    return folder / "m"


def training_losses(out: Path) -> list[float]:
    """Return the loss of each step, read from the last checkpoint."""
    state = json.loads((out / "training" / "checkpoint-24" / "trainer_state.json").read_text())
    return [e["loss"] for e in state["log_history"] if "loss" in e]


@pytest.mark.parametrize("kind", ["vdr", pytest.param("xtr", marks=pytest.mark.long)])
def test_resumed_training_matches_uninterrupted_training(base: Path, tmp_path: Path, kind: str) -> None:
    plan = loop.TrainingPlan(24, 8, 1e-3, every=4)

    def task() -> tasks.Task:
        torch.manual_seed(0)
        return tasks.VDRTask(base, LENGTHS, 50) if kind == "vdr" else tasks.XTRTask(base, LENGTHS, 16, 20)

    uninterrupted = task()
    loop.train(uninterrupted, training_pairs(), plan, tmp_path / "whole", False, lambda *_: None)
    losses = training_losses(tmp_path / "whole")
    assert len(losses) == 24
    assert sum(losses[-6:]) < sum(losses[:6]), "nothing was learned"
    assert (tmp_path / "whole" / "training" / loop.CURVE).read_bytes()[:4] == b"\x89PNG"

    class Interrupted(KeyboardInterrupt):
        pass

    def stop(step: int, _: float) -> None:
        if step == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        loop.train(task(), training_pairs(), plan, tmp_path / "parts", False, stop)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    with pytest.raises(RetrievalError, match="--resume"):
        loop.train(task(), training_pairs(), plan, tmp_path / "parts", False, lambda *_: None)
    with pytest.raises(RetrievalError, match="was begun with steps 24, not 25"):
        loop.train(
            task(), training_pairs(), loop.TrainingPlan(25, 8, 1e-3, every=4), tmp_path / "parts", True, lambda *_: None
        )
    with pytest.raises(RetrievalError, match="was begun with pairs"):
        loop.train(task(), training_pairs(99), plan, tmp_path / "parts", True, lambda *_: None)
    resumed = task()
    loop.train(resumed, training_pairs(), plan, tmp_path / "parts", True, lambda *_: None)
    assert training_losses(tmp_path / "parts") == pytest.approx(losses, rel=1e-3)
    for a, b in zip(uninterrupted.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        # The order of sums varies between threads, and Adam amplifies the difference.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-3)

    load_encoder: Any = vdr.load_vocabulary_encoder if kind == "vdr" else load_multi_vector_encoder
    encoder = load_encoder(str(tmp_path / "whole"))
    encoded: Any = encoder.encode_documents(["w1 w2 shark"])
    with torch.inference_mode():
        inputs = uninterrupted.tokenizer(["w1 w2 shark"], return_tensors="pt")
        out = uninterrupted.model(inputs["input_ids"], inputs["attention_mask"])[0]
    if kind == "vdr":
        dense = vdr.activate(out, "elu1p").numpy()
        np.testing.assert_allclose(encoded.values, dense[encoded.indices - tiny.SHIFT], rtol=1e-4)
    else:
        np.testing.assert_allclose(encoded.vectors.astype(np.float32), out.numpy(), atol=2e-3)
    finished = task()
    loop.train(finished, training_pairs(), plan, tmp_path / "parts", True, lambda *_: pytest.fail("one step too many"))
    for a, b in zip(resumed.model.state_dict().values(), finished.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (tmp_path / "parts" / "training" / "checkpoint-24" / "trainer_state.json").write_bytes(b"not a checkpoint")
    with pytest.raises(RetrievalError, match="cannot be read"):
        loop.train(task(), training_pairs(), plan, tmp_path / "parts", True, lambda *_: None)


def test_refuses_untrainable_models_and_test_qrels(base: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(RetrievalError, match="not empty"):
        loop.train(
            tasks.VDRTask(base, LENGTHS),
            training_pairs(),
            loop.TrainingPlan(1, 8, 1e-3),
            tmp_path,
            False,
            lambda *_: None,
        )
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    for task in (tasks.VDRTask, tasks.XTRTask):
        with pytest.raises(RetrievalError, match="type t5 cannot be trained"):
            task(tmp_path / "t5", LENGTHS)
        with pytest.raises(RetrievalError, match="there is no config"):
            task(tmp_path, LENGTHS)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t2\t1\n")
    with pytest.raises(RetrievalError, match="not to be learned from"):
        pairs.qrels_pairs(tmp_path)


@pytest.mark.parametrize("task", [tasks.VDRTask, tasks.XTRTask])
def test_training_stops_when_it_diverges(base: Path, tmp_path: Path, task: type[tasks.Task]) -> None:
    diverging = task(base, LENGTHS)
    with torch.no_grad():
        next(iter(diverging.model.parameters())).fill_(float("nan"))
    with pytest.raises(RetrievalError, match=r"step \d: \w+ is nan; lower --rate"):
        loop.train(diverging, training_pairs(), loop.TrainingPlan(2, 8, 1e-3), tmp_path / "out", False, lambda *_: None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_refuses_too_few_pairs(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="too few"):
        loop.train(
            tasks.VDRTask(base, LENGTHS),
            training_pairs(20),
            loop.TrainingPlan(1, 8, 1e-3),
            tmp_path,
            False,
            lambda *_: None,
        )
