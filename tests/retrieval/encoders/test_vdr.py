"""Tests of the VDR encoder and index against naive computations and against Sentence Transformers."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.vdr import VDR
from pilotfish.retrieval import Index, RetrievalError
from pilotfish.retrieval.encoders import vdr

TEXTS = ["shark w1 w2.", "the pilot fish w3", "w4 w5 w6 w7 w8 w9 whale", ""]


def elu1p(x: float) -> float:
    """Compute elu(x) + 1."""
    return x + 1 if x > 0 else float(np.exp(x))


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20))
def test_activations_match_naive_computation(logits: list[float]) -> None:
    x = torch.tensor(logits, dtype=torch.float32)
    np.testing.assert_allclose(vdr.activate(x, "elu1p"), [elu1p(v) for v in logits], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vdr.activate(x, "splade"), [np.log1p(max(v, 0.0)) for v in logits], rtol=1e-5, atol=1e-6)


def naive_vdr(model, ids: list[int], top: int) -> dict[int, float]:
    """Return the expected term weights of one text, computed term by term."""
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        logits = model.ln(hidden) @ model.embeddings.word_embeddings.weight[tiny.SHIFT :].t()
    weights = {tiny.SHIFT + v: max(elu1p(float(x)) for x in logits[:, v]) for v in range(logits.shape[1])}
    best = sorted(weights, key=lambda v: -weights[v])[:top]
    expected = {v: weights[v] for v in {*best, *(i for i in ids if i >= tiny.SHIFT)}}
    reference = VDR.encode(logits.numpy(), [i - tiny.SHIFT for i in ids if i >= tiny.SHIFT], top)
    assert {tiny.SHIFT + int(v): pytest.approx(reference[v]) for v in reference.nonzero()[0]} == expected
    return expected


@pytest.mark.parametrize(("shared", "suffix"), [(False, "safetensors"), (True, "safetensors"), (False, "bin")])
def test_published_checkpoint_matches_naive_computation(tmp_path: Path, shared: bool, suffix: str) -> None:
    models = tiny.published_vdr(tmp_path / "m", shared, suffix)
    encoder = vdr.load_vocabulary_encoder(str(tmp_path / "m"), top=20)
    assert encoder.activation == "elu1p"
    for side, encode in (("encoder_q", encoder.encode_queries), ("encoder_p", encoder.encode_documents)):
        model = models.get(side, models["encoder_q"])
        length = 16 if side == "encoder_q" else 32
        texts = [*TEXTS, " ".join(tiny.WORDS[:60])]
        encoded = encode(texts)
        for i, text in enumerate(texts):
            ids = encoder._tokenizer(text, truncation=True, max_length=length)["input_ids"]
            expected = naive_vdr(model, ids, 20)
            actual = dict(zip(encoded[i].indices.tolist(), encoded[i].values.tolist(), strict=True))
            assert set(actual) == set(expected)
            for v, weight in actual.items():
                assert weight == pytest.approx(expected[v], rel=1e-4)
            in_text = {v for v, o in zip(encoded[i].indices.tolist(), encoded[i].in_text.tolist(), strict=True) if o}
            assert in_text == {v for v in ids if v >= tiny.SHIFT}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(TEXTS))))
def test_encoding_does_not_depend_on_the_batch(order: list[int]) -> None:
    encoder = vdr.load_vocabulary_encoder()
    together = encoder.encode_documents([TEXTS[i] for i in order])
    for row, i in enumerate(order):
        alone = encoder.encode_documents([TEXTS[i]])
        assert together[row].indices.tolist() == alone.indices.tolist()
        np.testing.assert_allclose(together[row].values, alone.values, atol=1e-5)


def test_embedded_checkpoint_is_loaded_completely() -> None:
    """Test that the old LayerNorm names of the checkpoint are mapped; parameters without a value would be random."""
    state = vdr.term_weights_of_logits(vdr.find_packaged_masked_lm())
    model = vdr.load_vocabulary_encoder()._models[0].model
    parameters = dict(model.named_parameters())
    old = {k: v for k, v in state.items() if k.endswith((".gamma", ".beta"))}
    assert len(old) == 12
    for name, value in old.items():
        new = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        torch.testing.assert_close(parameters[new].data, value)
    encoded = vdr.load_vocabulary_encoder().encode_queries(["which animals follow sharks?"])
    best = [vdr.load_vocabulary_encoder().term(int(i)) for i in encoded.indices[np.argsort(-encoded.values)[:8]]]
    assert {"sharks", "shark", "follow", "animals"} <= set(best)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
@pytest.mark.parametrize("where", ["embedded", "saved"])
def test_output_matches_sentence_transformers(tmp_path: Path, where: str) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    folder = vdr.find_packaged_masked_lm()
    if where == "saved":
        tiny.masked_lm(tmp_path / "lm")
        folder = tmp_path / "lm"
    model = SparseEncoder(modules=[MLMTransformer(str(folder), max_seq_length=48), SpladePooling("max")], device="cpu")
    encoder = vdr.load_vocabulary_encoder(top=0)
    if where == "saved":
        model.save_pretrained(str(tmp_path / "saved"))
        encoder = vdr.load_vocabulary_encoder(str(tmp_path / "saved"), top=0)
        assert encoder.activation == "splade"
    expected = model.encode_document(TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True).numpy()
    encoded = encoder.encode_documents(TEXTS)
    for i in range(len(TEXTS)):
        actual = np.zeros_like(expected[i])
        actual[encoded[i].indices] = encoded[i].values
        np.testing.assert_allclose(actual, expected[i], atol=1e-5)


def test_refuses_invalid_vdr_checkpoints(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "plain")
    tiny.published_vdr(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"x" * 40)
    tiny.published_vdr(tmp_path / "mean")
    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    config["encoder_q"]["pooling"] = "mean"
    (tmp_path / "mean" / "config.json").write_text(json.dumps(config))
    tiny.masked_lm(tmp_path / "wordless")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wordless" / name).unlink(missing_ok=True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "no such folder"),
        ("empty", "there is no config.json"),
        ("plain", "has no term weights"),
        ("mean", "only max pooling"),
        ("wordless", "has no tokenizer"),
        ("cut", "encoder"),
    ):
        with pytest.raises(RetrievalError, match=message) as caught:
            vdr.load_vocabulary_encoder(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(RetrievalError, match="expected auto, elu1p, splade"):
        vdr.load_vocabulary_encoder(activation="relu")


DOCUMENTS = [
    {"id": "sea", "text": "Pilot fish travel with sharks and eat parasites."},
    {"id": "road", "text": "The engine of a car burns fuel."},
    {"id": "whales", "text": "Whales are mammals of the sea."},
]
QUERY = "which animals follow sharks?"


def make_index(folder: Path, **options) -> Index:
    index = Index.create(folder, "vdr", options=options)
    index.add(DOCUMENTS)
    return index


def test_term_weights_bag_of_words_and_reranking(tmp_path: Path) -> None:
    with make_index(tmp_path / "weights", bits=16) as index:
        encoder = vdr.load_vocabulary_encoder()
        query, documents = encoder.encode_queries([QUERY]), encoder.encode_documents([d["text"] for d in DOCUMENTS])
        for form, sides in (("weights", query), ("bag_of_words", encoder.bags_of_words([QUERY]))):
            hits = {h.id: h.score for h in index.search(QUERY, query_encoding=form)}
            for i, document in enumerate(DOCUMENTS):
                weights = dict(zip(documents[i].indices.tolist(), documents[i].values.tolist(), strict=True))
                expected = sum(
                    w * weights.get(v, 0) for v, w in zip(sides.indices.tolist(), sides.values.tolist(), strict=True)
                )
                assert hits.get(document["id"], 0.0) == pytest.approx(expected, abs=2e-2)
        assert [h.id for h in index.search(QUERY)][:2] == ["sea", "whales"]
    with make_index(tmp_path / "bags", document_encoding="bag_of_words") as index:
        hits = index.search(QUERY)
        assert [h.id for h in hits] == ["sea"]  # the other documents share no term with the query
        reranked = index.search(QUERY, rerank=5)
        assert reranked[0].score == pytest.approx(float(encoder.score(query[0], [DOCUMENTS[0]["text"]])[0]), rel=1e-5)


def test_term_boosts_raise_and_remove_terms(tmp_path: Path) -> None:
    with make_index(tmp_path / "x", bits=16) as index:
        plain = {h.id: h.score for h in index.search(QUERY)}
        banned = index.search(QUERY, term_boosts={"shark": 0, "sharks": 0, "fish": 0})
        assert banned[0].id == "whales"
        assert {r.query for r in index.explain(QUERY, "sea", term_boosts={"shark": 0})} & {"shark"} == set()
        boosted = {r.query: r.score for r in index.explain(QUERY, "sea", term_boosts={"shark": 2})}
        unboosted = {r.query: r.score for r in index.explain(QUERY, "sea")}
        assert boosted["shark"] == pytest.approx(2 * unboosted["shark"], rel=1e-5)
        added = index.search(QUERY, term_boosts={"engine": 5})
        assert {h.id: h.score for h in added}["road"] > plain.get("road", 0.0) + 1
        for words, message in (
            ({"\U0001f988": 1.0}, "not in the encoder's vocabulary"),
            ({"shark": -1}, "expected a factor from 0 on"),
            ({"shark": True}, "expected a factor|expected float"),
            (["shark"], "expected object of float"),
        ):
            with pytest.raises(RetrievalError, match=message):
                index.search(QUERY, term_boosts=words)


@pytest.mark.parametrize("options", [{}, {"document_encoding": "bag_of_words"}, {"activation": "elu1p"}])
def test_explanation_sums_to_the_score_and_names_terms(tmp_path: Path, options: dict) -> None:
    with make_index(tmp_path / "x", **options) as index:
        hit = index.search(QUERY, 1)[0]
        reasons = index.explain(QUERY, hit.id)
        assert sum(r.score for r in reasons) == pytest.approx(hit.score, rel=1e-4)
        assert [r.score for r in reasons] == sorted((r.score for r in reasons), reverse=True)
        terms = index.term_weights(QUERY, hit.id)
        assert terms is not None
        assert "sharks" in [w for w, _ in terms.query][:5]
        assert "fish" in [w for w, _ in terms.document]
        with pytest.raises(RetrievalError, match="no document 'zz'"):
            index.term_weights(QUERY, "zz")
