"""Tests of the commands in README: index a folder, then answer a question with a citation."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def commands(root: Path) -> list[str]:
    """Return the shell commands of the section "Try it"."""
    text = (root / "README.md").read_text(encoding="utf-8").split("## Without a GPU")[1].split("## Guarantees")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_readme_commands_answer_a_question_with_a_citation(root: Path, tmp_path: Path) -> None:
    demo, tests, *others = commands(root)
    assert demo.startswith("make demo") and tests.startswith("make test")
    build, ask = (shlex.split(line.replace("out/", f"{tmp_path}/")) for line in others)
    for arguments in (build, ask):
        assert arguments[0] == ".venv/bin/pilotfish"
        result = subprocess.run(
            [sys.executable, "-m", "pilotfish", *arguments[1:]],
            cwd=root, capture_output=True, text=True, timeout=400, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert re.search(r"^\[\d\] .*razor_attention\.md.*: ", result.stdout, re.MULTILINE), result.stdout
    assert "drafter accepted tokens" in result.stderr
