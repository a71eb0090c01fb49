"""What README tells a newcomer to type, typed: a folder in an index, a question answered with a citation."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def commands(root: Path) -> list[str]:
    """Those behind the demo and the tests, which others run."""
    text = (root / "README.md").read_text(encoding="utf-8").split("## Try it")[1].split("## Use it")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_the_path_of_a_newcomer(root: Path, tmp_path: Path) -> None:
    demo, tests, *path = commands(root)
    assert demo.startswith("make demo") and tests.startswith("make test")
    build, ask = (shlex.split(line.replace("out/", f"{tmp_path}/")) for line in path)
    for words in (build, ask):
        assert words[0] == ".venv/bin/pilotfish"
        done = subprocess.run(
            [sys.executable, "-m", "pilotfish", *words[1:]],
            cwd=root, capture_output=True, text=True, timeout=400, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert re.search(r"^\[\d\] .*razor_attention\.md.*: ", done.stdout, re.MULTILINE), done.stdout
    assert "drafter accepted tokens" in done.stderr
