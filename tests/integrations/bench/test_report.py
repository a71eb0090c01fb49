"""The HTML report: complete, escaped, self-contained, and listing every loss."""

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from pilotfish.integrations.bench import plots, report

Cli = Callable[..., subprocess.CompletedProcess[str]]


def results(**records: dict[str, float]) -> dict[str, Any]:
    """Return the content of a result file, from values by dataset and ``arm/metric``."""
    flat = [
        {"benchmark": "x", "dataset": dataset, "arm": name.split("/")[0], "metric": name.split("/")[1], "value": value,
         "unit": "", "runs": [], "params": {}}
        for dataset, values in records.items() for name, value in values.items()
    ]  # fmt: skip
    about = {"machine": {"processor": "<b>P", "cores": 2, "memory_gib": 1}, "versions": {"torch": "1"}}
    return {**about, "command": "pilotfish bench <x>", "date": "2026-01-01", "records": flat, "name": "some"}


def test_losses_are_sorted_worst_first() -> None:
    result = results(
        one={"rasd/speedup": 0.9, "suffix/speedup": 0.5, "rasd@nodes=4/speedup": 0.99, "xtr/ndcg@10": 0.4},
        two={"rasd/speedup": 0.7, "xtr/ndcg@10": 0.3, "bm25s/ndcg@10": 0.6, "maxsim/ndcg@10": 0.2},
    )
    losses = [(loss["arm"], loss["where"], loss["by"]) for loss in report.losses([result], {"rasd", "xtr"})]
    assert losses == [("xtr", "two", "bm25s"), ("rasd", "two", "stock"), ("rasd", "one", "stock")]


def test_page_is_escaped_and_self_contained(tmp_path: Path) -> None:
    result = results(
        **{"one $\\frac$": {"rasd/speedup": 0.9, "<i>/speedup": 2.0, "rasd/odd_metric": 3.0, "x$_{$y/speedup": 1.0}}
    )
    report.write_report([result], ["rasd"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>P" not in page and "<i>" not in page and "&lt;i&gt;" in page and "bench &lt;x&gt;" in page
    assert "odd metric" in page, "metrics without a display name are shown"
    before = page
    report.write_report([result], ["rasd"], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == before, "the output is deterministic"


def test_no_two_records_share_a_table_cell(root: Path) -> None:
    """Test that no two records of a result file share a table cell."""
    for result in report.read_results([root / "benchmarks" / "results"]):
        cells: dict[tuple[str, str, str], float] = {}
        for r in result["records"]:
            cell = r["arm"], r["metric"], report.record_place(r)
            assert cells.setdefault(cell, r["value"]) == r["value"], (result["name"], cell)


def test_report_of_all_committed_results(cli: Cli, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    written = cli("report", str(root / "benchmarks" / "results"), "--out", str(out))
    assert written.returncode == 0, written.stderr
    page = out.read_text(encoding="utf-8")
    for file in (root / "benchmarks" / "results").glob("*.json"):
        assert f'<h2 id="{file.stem}">' in page
        command = json.loads(file.read_text(encoding="utf-8"))["command"]
        assert command.split()[0] in page
    assert "<script" not in page and "<link" not in page and "url(http" not in page and "@import" not in page
    assert all(value.startswith("#") for value in re.findall(r'(?<!xlink:)\b(?:src|href)="([^"]*)"', page))
    for plugin in ("razor_attention", "tidal_decode", "token_recycling", "rasd", "globalcom2", "aim", "xtr", "vdr"):
        assert f"<h3>{plugin}</h3>" in page or f">{plugin} " in page, plugin
    assert 'class="loses"' in page
    lost = page[page.index("loses") :]
    assert "xquad, conversation" in lost, "losses in conversations are listed"


def test_labels_of_close_points_do_not_overlap() -> None:
    values = {f"arm_{i}": (1.0 + i / 50, 0.5 + i / 1000) for i in range(8)}
    records = [
        {"benchmark": "retrieval", "dataset": "cranfield", "arm": arm, "metric": m, "value": v, "params": {}}
        for arm, point in values.items()
        for m, v in zip(("query_ms_median", "ndcg@10"), point, strict=True)
    ]
    figure = plots.retrieval_latency(records)
    assert figure is not None
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == len(values)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(
    ("arm", "default"),
    [
        ("globalcom2", True),
        ("globalcom2@retain=0.25", True),
        ("globalcom2@retain=0.5", False),
        ("globalcom2@retain=0.25@unknown=1", False),
        ("diversity@retain=0.25", False),
        ("globalcom2@cold", True),
    ],
)
def test_default_settings_are_recognised_when_named(arm: str, default: bool) -> None:
    assert report.is_default_arm(arm, "globalcom2") is default


def test_refuses_invalid_result_files(cli: Cli, inside: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content in ("", "{}", "[]", '{"records": 1}', json.dumps({**results(), "records": [{}]})):
        bad.write_text(content)
        refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json", "not a result file")
    for wrong in ('"1.5"', "NaN", "Infinity", "null", "true", "[1]"):
        bad.write_text(json.dumps(results(a={"rasd/speedup": 0.125})).replace("0.125", wrong))
        refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json", "not a finite number")
    for change in ({"versions": []}, {"machine": None}):
        bad.write_text(json.dumps({**results(a={"rasd/speedup": 0.5}), **change}))
        refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json", "not objects")
    for name in ("\ud800", "\0", "\x1b[0m"):
        bad.write_text(json.dumps(results(**{name: {"rasd/speedup": 0.5}})))
        refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json")
    bad.write_text(json.dumps(results(a={"rasd/speedup": 10**400})))
    refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json")
    bad.write_text(json.dumps(results(a={"rasd/speedup": 0.5})).replace('"a"', "7"))
    refused(inside("report", str(bad), "--out", str(tmp_path / "x.html")), "bad.json", "must be strings")
    refused(cli("report", str(tmp_path / "absent.json")), "absent.json")
    (tmp_path / "empty").mkdir()
    refused(inside("report", str(tmp_path / "empty"), "--out", str(tmp_path / "x.html")), "no result files")
    refused(inside("report", str(bad), "--out", str(tmp_path)), "a folder")
    assert not (tmp_path / "x.html").exists()
