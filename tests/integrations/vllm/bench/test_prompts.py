import gzip
import json
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.bench import prompts
from pilotfish.plugins.config import ConfigError


def write(path: Path, lines: list[dict]) -> Path:
    """Write ``lines`` as JSON lines, compressed if the suffix is .gz, and return the path."""
    text = "\n".join(map(json.dumps, lines))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_reads_common_prompt_formats(tmp_path: Path) -> None:
    lines = [{"turns": ["a", "b"], "category": "qa"}, {"prompt": "c"}, {"task_id": "HumanEval/0", "prompt": "def f():"}]
    for name in ("x.jsonl", "x.jsonl.gz"):
        read = prompts.read_prompts(write(tmp_path / name, lines))
        assert [(p.category, p.dataset) for p in read] == [(c, tmp_path.name) for c in ("qa", "all", "code")]
        assert [p.text for p in read][:2] == ["a", "c"]
        assert "def f():" in read[2].text


@pytest.mark.parametrize("lines", [[], [{"category": "x"}], [{"turns": []}], [{"prompt": 3}], ["text"]])
def test_refuses_files_without_prompts(tmp_path: Path, lines: list) -> None:
    with pytest.raises(ConfigError, match="--prompts"):
        prompts.read_prompts(write(tmp_path / "x.jsonl", lines))
    with pytest.raises(ConfigError, match="No such file"):
        prompts.read_prompts(tmp_path / "none.jsonl")


def test_samples_are_seeded_and_cover_all_categories(tmp_path: Path) -> None:
    lines = [{"prompt": f"{c}{i}", "category": c} for c, n in (("a", 30), ("b", 3), ("c", 9)) for i in range(n)]
    read = prompts.read_prompts(write(tmp_path / "x.jsonl", lines))
    sampled = prompts.sample_prompts(read, 12, seed=1)
    assert sampled == prompts.sample_prompts(read, 12, seed=1) != prompts.sample_prompts(read, 12, seed=2)
    assert {c: sum(p.category == c for p in sampled) for c in "abc"} == {"a": 5, "b": 3, "c": 4}
    others = prompts.remaining_prompts(read, sampled, 10, seed=1)
    assert len(others) == 10
    assert not set(others) & set(sampled)
    assert len(prompts.sample_prompts(read, 1000, seed=1)) == len(read)
