"""Fixtures and pytest hooks that all tests share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gpu import HAS_GPU

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")  # no network
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if WORKER:
    # Engines of parallel test workers use one thread each. With more threads than cores, each barrier of OpenMP waits
    # for a thread that is not running. vLLM's worker processes obey the second variable, engines in one process the
    # first.
    CORES = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(CORES[int(WORKER) % len(CORES)]))

INTERPRETED = find_spec("triton") is not None and not HAS_GPU
if INTERPRETED:
    # Triton decides whether it interprets a kernel when the kernel's module is imported, so all of them are imported
    # here: another test may import one first. The variable is removed again, because the engines that tests start
    # inherit the environment; see `interpreted_triton`.
    import pilotfish

    os.environ["TRITON_INTERPRET"] = "1"
    PACKAGE = Path(pilotfish.__file__).parent
    for module in sorted(PACKAGE.glob("*/**/*_triton.py")):
        import_module(".".join(["pilotfish", *module.relative_to(PACKAGE).with_suffix("").parts]))
    del os.environ["TRITON_INTERPRET"]

Cli = Callable[..., subprocess.CompletedProcess[str]]
FEATURE_RESULTS: list[tuple[str, str, str, bool]] = []  # (plugin, feature, test ID, passed)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root folder of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="module")
def interpreted_triton() -> Iterator[None]:
    """Run Triton kernels in the interpreter if the machine has no GPU."""
    if not INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that creates an index with a fast test encoder."""
    import words

    from pilotfish.retrieval import Index

    words.use()

    def make(name: str = "index", kind: str = "xtr", **options: Any) -> Index:
        encoder, default_options = words.KINDS[kind]
        return Index.create(tmp_path / name, kind, encoder, {**(default_options if kind != "xtr" else {}), **options})

    make.folder = tmp_path / "index"  # type: ignore[attr-defined]
    return make


@pytest.fixture
def cli() -> Cli:
    """Return a function that runs `pilotfish` in a subprocess."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pilotfish", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "160", **environment},
        )

    return run


@pytest.fixture
def preloaded_cli() -> Cli:
    """Return a function that runs `pilotfish` in a process that has imported vLLM already."""
    from preloaded_cli import run_preloaded

    return run_preloaded


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs `pilotfish` in this process, which is faster than `cli`."""
    from pilotfish.__main__ import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["pilotfish", *arguments])
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, int(caught.value.code or 0), *capsys.readouterr())

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--compatibility`, used by `make compatibility`."""
    parser.addoption(
        "--compatibility", type=Path, help="write the results of tests with the marker `shows` to this file"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record the result of a test with the marker `shows`, unless it was skipped."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if not report.skipped and (report.when == "call" or report.failed):
        shown = [marker.args for marker in item.iter_markers("shows")]
        common = [feature for marker in item.iter_markers("shows_too") for feature in marker.args]
        for plugin, *features in shown:
            FEATURE_RESULTS.extend((plugin, feature, item.nodeid, report.passed) for feature in features + common)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the recorded results to the file given with `--compatibility`."""
    path = session.config.getoption("--compatibility")
    if path is not None:
        from pilotfish.integrations.bench import record

        record.write_records(
            path,
            [
                record.Record("compatibility", feature, plugin, "works", float(passed), "", [], {"test": test})
                for plugin, feature, test, passed in FEATURE_RESULTS
            ],
            command="make compatibility",
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the frameworks' own conformance tests that passed."""
    for framework, module in (
        ("langchain-tests", "langchain/test_vectorstore"),
        ("Haystack's mixins", "haystack/test_document_store"),
    ):
        passed = [r.nodeid for r in terminalreporter.stats.get("passed", []) if f"{module}.py::Test" in r.nodeid]
        if passed:
            terminalreporter.section(f"{framework}: {len(passed)} passed")
            names = sorted(name.partition("::")[2].replace("::", ".") for name in passed)
            terminalreporter.write_line(", ".join(names))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engine tests last, so that faster tests fail first; the slow modules of them first, for parallel workers."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (0, False) if item.get_closest_marker("engine") is None else (1, item.path not in slow))
