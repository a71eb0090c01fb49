"""Tests of BERT in NumPy against transformers, and of searches that start without it."""

import subprocess
import sys

import numpy as np
import pytest

from pilotfish.retrieval import Index
from pilotfish.retrieval.encoders import load_multi_vector_encoder
from pilotfish.retrieval.encoders.bert_queries import BertQueries
from pilotfish.retrieval.encoders.multi_vector import MultiVectorEncoder, find_packaged_minilm


@pytest.fixture(scope="module")
def encoder() -> MultiVectorEncoder:
    return load_multi_vector_encoder()


@pytest.mark.parametrize(
    "query", ["", "fish", "Which fish follow sharks?", "Größe der Élite", "故乡", "word " * 200, "[CLS] [MASK] x", "😀"]
)
def test_vectors_match_transformers(encoder: MultiVectorEncoder, query: str) -> None:
    few = BertQueries.load(encoder.checkpoint)
    assert few is not None
    expected = encoder._encode(encoder._query_model, encoder._ids([query], query=True), None, set())
    found = few.encode(query)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.vectors, expected.vectors.astype(np.float32), atol=1e-3)  # float16
    assert (found.vectors * expected.vectors.astype(np.float32)).sum(1).min() > 1 - 1e-3
    assert found.pooled is not None and expected.pooled is not None
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)


def test_other_checkpoints_are_left_to_torch(tmp_path) -> None:
    from pilotfish.retrieval.encoders.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(find_packaged_minilm())
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes((checkpoint.backbone / name).read_bytes())
    assert BertQueries.load(read_checkpoint(folder)) is not None
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    assert BertQueries.load(read_checkpoint(folder)) is None
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(b"broken")
    assert BertQueries.load(read_checkpoint(folder)) is None


def test_a_search_imports_neither_torch_nor_transformers(tmp_path) -> None:
    with Index.create(tmp_path / "index") as index:
        index.add([{"id": "a", "text": "Pilot fish follow sharks."}, {"id": "b", "text": "Bread is baked."}])
    code = (
        "import sys; from pilotfish.retrieval import Index\n"
        f"print(Index.open({str(tmp_path / 'index')!r}).search('which fish follow sharks?', 1)[0].id)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout == "a\n"
