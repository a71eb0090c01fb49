"""Tests of the multi-vector encoders: the embedded one against Transformers, and checkpoints of each format."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from pilotfish.retrieval import RetrievalError
from pilotfish.retrieval.encoders import checkpoints, load_multi_vector_encoder
from pilotfish.retrieval.encoders.multi_vector import MultiVectorEncoder, find_packaged_minilm
from pilotfish.retrieval.encoders.tokenization import token_batches

TEXTS = [
    "Pilot fish travel with sharks.",
    "x",
    "A much longer text, which is about nothing " * 20,
    "Pilot fish travel with sharks.",
]


def test_vectors_match_transformers() -> None:
    encoder = load_multi_vector_encoder()
    tokens = encoder.encode_documents(TEXTS)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(find_packaged_minilm()),
        AutoModel.from_pretrained(find_packaged_minilm()).eval(),
    )
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(model(**ids).last_hidden_state[0], dim=-1).numpy()
        np.testing.assert_allclose(tokens[i].vectors.astype(np.float32), expected, atol=2e-3)
        assert tokens[i].token_ids.tolist() == ids["input_ids"][0].tolist()
        assert len(encoder.words(text, query=False)) == len(expected)


def test_batches_group_texts_of_similar_lengths() -> None:
    lengths = [3, 500, 7, 400, 4, 9000]
    batches = token_batches(lengths)
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert [lengths[b[0]] for b in batches] == sorted((lengths[b[0]] for b in batches), reverse=True)


def test_chunks_cover_the_text() -> None:
    encoder = load_multi_vector_encoder()
    text = " ".join(f"word{i}" for i in range(300))
    pieces = encoder.chunks(text, 50, 10)
    assert all(piece in text for piece in pieces)
    assert len(encoder.chunks("short", 50, 10)) == 1
    for a, b in itertools.pairwise(pieces):
        assert text.find(b) < text.find(a) + len(a)  # they overlap
    assert pieces[0].startswith("word0")
    assert pieces[-1].endswith("word299")
    with pytest.raises(RetrievalError, match="cannot overlap"):
        encoder.chunks(text, 5, 5)


def test_int8_vectors_are_close_to_float32() -> None:
    int8_encoder = load_multi_vector_encoder(precision="int8")
    float32, int8 = load_multi_vector_encoder().encode_queries(TEXTS[:1]), int8_encoder.encode_queries(TEXTS[:1])
    assert (float32.vectors * int8.vectors).sum(1).min() > 0.9


def test_refuses_unknown_precision_before_loading_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for precision, query_precision in (("int7", None), ("float32", "int7")):
        with pytest.raises(RetrievalError, match="expected float32"):
            load_multi_vector_encoder(precision=precision, query_precision=query_precision)


@pytest.fixture
def colbert(tmp_path: Path) -> Path:
    """Return a folder with MiniLM and a projection in PyLate's format."""
    folder = tmp_path / "colbert"
    shutil.copytree(find_packaged_minilm(), folder)
    (folder / "1_Dense").mkdir()
    generator = torch.Generator().manual_seed(0)
    from safetensors.torch import save_file

    save_file({"linear.weight": torch.randn(32, 384, generator=generator)}, folder / "1_Dense" / "model.safetensors")
    (folder / "1_Dense" / "config.json").write_text(
        json.dumps({"activation_function": "torch.nn.modules.linear.Identity"})
    )
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    config = {
        "query_prefix": "query: ",
        "document_prefix": "doc: ",
        "query_length": 16,
        "document_length": 20,
        "do_query_expansion": True,
        "skiplist_words": [".", ","],
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def test_pylate_colbert_checkpoint(colbert: Path) -> None:
    encoder = load_multi_vector_encoder(str(colbert))
    assert encoder.dimension == 32
    query = encoder.encode_queries(["fish"])
    assert query.counts.tolist() == [16]  # padded with mask tokens
    assert encoder.words("fish", query=True)[:3] == ["[CLS]", "query", ":"]
    document = encoder.encode_documents(["One, two. " * 30])
    assert document.counts[0] < 20  # truncated, and without punctuation
    tokenizer, model = AutoTokenizer.from_pretrained(colbert), AutoModel.from_pretrained(colbert).eval()
    ids = tokenizer("query: fish")["input_ids"]
    padded = torch.tensor([ids + [tokenizer.mask_token_id] * (16 - len(ids))])
    mask = torch.tensor([[1] * len(ids) + [0] * (16 - len(ids))])
    weight = torch.from_numpy(checkpoints.read_checkpoint(colbert).layers[0].weight)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(
            model(padded, attention_mask=mask).last_hidden_state[0] @ weight.T, dim=-1
        )
    np.testing.assert_allclose(query.vectors, expected.numpy(), atol=2e-3)


def test_xtr_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "xtr"
    config = T5Config(vocab_size=30522, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder)
    for path in find_packaged_minilm().iterdir():
        if "token" in path.name or path.name == "vocab.txt":
            shutil.copy(path, folder)
    (folder / "2_Dense").mkdir()
    torch.save({"linear.weight": torch.randn(8, 32)}, folder / "2_Dense" / "pytorch_model.bin")
    encoder = load_multi_vector_encoder(str(folder))
    assert encoder.checkpoint.t5
    assert (encoder.dimension, encoder.checkpoint.query_length, encoder.checkpoint.document_length) == (8, 32, 512)
    assert encoder.encode_queries(["SHARK"]).vectors.tolist() == encoder.encode_queries(["shark"]).vectors.tolist()


def test_stanford_colbert_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "stanford"
    shutil.copytree(find_packaged_minilm(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "linear.weight": torch.randn(16, 384)}, folder / "model.safetensors")
    (folder / "artifact.metadata").write_text(json.dumps({"query_maxlen": 12, "doc_maxlen": 30}))
    encoder = load_multi_vector_encoder(str(folder))
    assert encoder.encode_queries(["fish"]).counts.tolist() == [12]
    assert encoder.words("fish", query=True)[:3] == ["[CLS]", "[unused0]", "fish"]
    assert "." not in encoder.words("fish.", query=False)


def test_refuses_folders_without_a_model(tmp_path: Path, colbert: Path) -> None:
    with pytest.raises(RetrievalError, match=r"no config\.json"):
        load_multi_vector_encoder(str(tmp_path))
    (colbert / "1_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.Tanh"}))
    with pytest.raises(RetrievalError, match="Tanh is not supported"):
        checkpoints.read_checkpoint(colbert)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_multi_vector_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RetrievalError, match="encoder"):
        MultiVectorEncoder(checkpoints.read_checkpoint(tmp_path), "x")


def test_fingerprint_changes_with_the_files(colbert: Path) -> None:
    before = checkpoints.read_checkpoint(colbert).fingerprint()
    assert before == checkpoints.read_checkpoint(colbert).fingerprint()
    path = colbert / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace("16", "17"))
    assert checkpoints.read_checkpoint(colbert).fingerprint() != before
