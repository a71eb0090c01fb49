"""Fixtures that all tests share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")  # no network
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

INTERPRETED = find_spec("triton") is not None and not Path("/dev/nvidiactl").exists()
if INTERPRETED:
    # Triton decides as it is imported whether it interprets; see `interpreted_triton`. Not for the engines that tests
    # start: they inherit the environment.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

Cli = Callable[..., subprocess.CompletedProcess[str]]
SHOWN: list[tuple[str, str, str, bool]] = []  # plugin, feature, test, whether it passed


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="module")
def interpreted_triton() -> Iterator[None]:
    """Triton's kernels are interpreted where there is no GPU."""
    if not INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., Any]:
    """Create indexes whose encoders are fast."""
    import words

    from pilotfish.retrieval import Index

    words.use()

    def make(name: str = "index", kind: str = "xtr", **options: Any) -> Index:
        encoder, usual = words.KINDS[kind]
        return Index.create(tmp_path / name, kind, encoder, {**(usual if kind != "xtr" else {}), **options})

    make.folder = tmp_path / "index"  # type: ignore[attr-defined]
    return make


@pytest.fixture
def cli() -> Cli:
    """Run `pilotfish` in a process of its own."""

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
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `pilotfish` within this process: for the many inputs that are refused, once `cli` has shown that one is."""
    from pilotfish.__main__ import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["pilotfish", *arguments])
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), *capsys.readouterr())

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table of compatibility comes from; see `make compatibility`."""
    parser.addoption("--compatibility", type=Path, help="write what tests with the marker `shows` have shown")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep whether a test passed that shows something; one that was skipped shows nothing."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    shown = item.get_closest_marker("shows")
    if shown is not None and not report.skipped and (report.when == "call" or report.failed):
        plugin, *features = shown.args
        SHOWN.extend((plugin, feature, item.nodeid, report.passed) for feature in features)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write it."""
    path = session.config.getoption("--compatibility")
    if path is not None:
        from pilotfish.integrations.bench import record

        record.write_records(
            path,
            [
                record.Record("compatibility", feature, plugin, "works", float(passed), "", [], {"test": test})
                for plugin, feature, test, passed in SHOWN
            ],
            command="make compatibility",
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests of frameworks that passed: those are promises to people who never see ours."""
    for framework, module in (("langchain-tests", "test_langchain"), ("Haystack's mixins", "test_haystack")):
        passed = [r.nodeid for r in terminalreporter.stats.get("passed", []) if f"{module}.py::Test" in r.nodeid]
        if passed:
            terminalreporter.section(f"{framework}: {len(passed)} passed")
            names = sorted(name.partition("::")[2].replace("::", ".") for name in passed)
            terminalreporter.write_line(", ".join(names))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests last: what needs no engine fails first."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
