"""Tests of `pilotfish index` with the embedded encoder, in subprocesses; most refused inputs run in this process."""

import csv
import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index, RetrievalError
from pilotfish.retrieval.loaders import DocumentSource

DOCUMENTS = [
    {"id": "shark", "text": "The whale shark is the largest fish in the sea.", "year": 2019, "lang": "en"},
    {"id": "pilot", "text": "Pilot fish travel with sharks and eat their parasites.", "year": 2021, "lang": "en"},
    {"id": "tax", "text": "Income tax returns are due in April.", "year": 2022, "lang": "en"},
    {"id": "brot", "text": "Brot wird aus Mehl und Wasser gebacken.", "year": 2023, "lang": "de"},
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    return path


@pytest.mark.slow
def test_build_search_update_check_and_export(cli: Callable, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "index")
    answer = cli("index", "build", folder, str(corpus))
    assert answer.returncode == 0, answer.stderr
    assert "4 documents added, 4 in all" in answer.stderr
    answer = cli("index", "search", folder, "who follows sharks?", "--json", "-k", "2")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["hits"][0]["id"] == "pilot"
    answer = cli("index", "search", folder, "who", "follows", "sharks?", "--where", "year < 2020")
    assert "shark" in answer.stdout
    assert "pilot" not in answer.stdout
    more = tmp_path / "more.csv"
    with more.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [["id", "text", "year"], ["ray", "Manta rays filter plankton.", "2024"], ["tax", "Taxes, anew.", ""]]
        )
    assert "'tax' is in the index already" in cli("index", "add", folder, str(more)).stderr
    assert "2 documents added, 5 in all" in cli("index", "add", folder, str(more), "--upsert").stderr
    answer = cli("index", "delete", folder, "brot", "--where", "year = 2019")
    assert "2 documents deleted, 3 left" in answer.stderr
    answer = cli("index", "explain", folder, "manta plankton", "ray", "--json")
    matched = {r["query"]: r["document"] for r in json.loads(answer.stdout)}
    assert matched["plank"] == "plank"
    assert cli("index", "compact", folder).returncode == 0
    assert "3 documents, all right" in cli("index", "check", folder).stdout
    stats = json.loads(cli("index", "stats", folder, "--json").stdout)
    assert (stats["documents"], stats["deleted"], stats["segments"]) == (3, 0, 1)
    answer = cli("index", "export", folder, str(tmp_path / "tokens.faiss"))
    assert answer.returncode == 0, answer.stderr
    check_faiss_export(tmp_path / "tokens.faiss")


def check_faiss_export(path: Path) -> None:
    """Assert that the exported FAISS index finds the document `ray` by its tokens."""
    import faiss
    import numpy as np

    from pilotfish.retrieval.encoders import load_multi_vector_encoder

    faiss_index = faiss.read_index(str(path))
    faiss_index.nprobe = faiss_index.nlist
    names = [json.loads(line) for line in path.with_name("tokens.faiss.documents.jsonl").read_text().splitlines()]
    assert faiss_index.ntotal == len(names)
    query = load_multi_vector_encoder().encode_queries(["manta rays"]).vectors @ np.load(
        path.with_name("tokens.faiss.projection.npy")
    )
    _, neighbors = faiss_index.search(np.ascontiguousarray(query / np.linalg.norm(query, axis=1, keepdims=True)), 1)
    assert [names[i] for i in neighbors[:, 0]].count("ray") >= len(neighbors) // 2


@pytest.mark.slow
def test_terms_are_explained_and_boosted(cli: Callable, inside: Callable, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "words")
    assert "4 documents added" in cli("index", "build", folder, str(corpus), "--kind", "vdr").stderr
    query = "who follows sharks?"
    page = tmp_path / "why.html"
    answer = cli("index", "explain", folder, query, "pilot", "--html", str(page))
    assert answer.returncode == 0, answer.stderr
    text = page.read_text()
    assert text.count("<section>") == 3
    assert "http" not in text  # the page loads nothing from other hosts
    explanation = inside("index", "explain", folder, query, "pilot").stdout
    assert "terms of the query" in explanation
    assert "█" in explanation
    payload = json.loads(inside("index", "explain", folder, query, "pilot", "--json").stdout)
    assert set(payload) == {"reasons", "query", "document"}
    hits = json.loads(inside("index", "search", folder, query, "--json").stdout)["hits"]
    edits = ("--word", "pilot=0", "--word", "shark=0", "--word", "sharks=0", "--word", "tax=50")
    edited = json.loads(inside("index", "search", folder, query, "--json", *edits).stdout)["hits"]
    assert {h["id"] for h in hits[:2]} == {"pilot", "shark"}
    assert edited[0]["id"] == "tax"
    for wrong, message in (("shark", "expected WORD=FACTOR"), ("shark=x", "WORD=FACTOR"), ("shark=-1", "from 0 on")):
        refused = inside("index", "search", folder, query, "--word", wrong)
        assert refused.returncode == 2
        assert message in refused.stderr
    (tmp_path / "evil.jsonl").write_text(json.dumps({"id": "<b>", "text": "<script>alert(1)</script> shark"}))
    assert inside("index", "add", folder, str(tmp_path / "evil.jsonl")).returncode == 0
    assert inside("index", "explain", folder, "<i>shark</i>", "<b>", "--html", str(page)).returncode == 0
    assert "<script" not in page.read_text()
    assert "<i>" not in page.read_text()


def test_hybrid_index_is_built_and_searched(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "both")
    options = ("--kind", "hybrid", "--option", "members=vdr+bm25")
    assert inside("index", "build", folder, str(corpus), *options).returncode == 0
    weighted = ("--set", 'weights={"bm25": 0.5}', "--set", "fusion=rrf")
    answer = inside("index", "search", folder, "sharks", "--json", *weighted)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["hits"][0]["id"] in ("pilot", "shark")
    assert "bm25" in inside("index", "explain", folder, "sharks", "pilot").stdout
    for arguments, message in (
        (("search", folder, "x", "--set", 'weights={"xtr": 1}'), "none of vdr, bm25"),
        (("export", folder, str(tmp_path / "x")), "only an XTR index"),
        (("tune", folder, str(write_beir(tmp_path, corpus))), "only an XTR index"),
    ):
        refused = inside("index", *arguments)
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1), refused.stderr
        assert message in refused.stderr


@pytest.mark.slow
def test_encoder_is_trained_and_used(cli: Callable, inside: Callable, corpus: Path, tmp_path: Path) -> None:
    import tiny

    tiny.encoder(tmp_path / "base")
    (tmp_path / "text.txt").write_text(
        " ".join(f"W{i % 150} w{i % 7} pilot fish w{i % 31} and more." for i in range(900))
    )
    options = ("--text", str(tmp_path / "text.txt"), "--base", str(tmp_path / "base"), "--steps", "3", "--batch", "8")
    out = tmp_path / "made"
    answer = cli("train", "vdr", str(out), *options)
    assert answer.returncode == 0, answer.stderr
    assert (out / "training" / "curve.png").exists()
    assert cli("train", "vdr", str(out), *options).returncode == 2
    answer = cli("index", "build", str(tmp_path / "i"), str(corpus), "--kind", "vdr", "--encoder", str(out))
    assert answer.returncode == 0, answer.stderr
    for wrong, message in (
        ((), "give --qrels FOLDER, --text PATH"),
        (("--text", str(tmp_path / "none")), "none"),
        (("--qrels", str(tmp_path)), "qrels"),
        (("--text", str(tmp_path / "text.txt"), "--base", str(tmp_path)), "--base"),
    ):
        refused = inside("train", "xtr", str(tmp_path / "wrong"), *wrong)
        assert refused.returncode == 2, refused.stderr
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "wrong").exists()


def test_moved_encoder_is_reported_and_can_be_replaced(
    cli: Callable, inside: Callable, corpus: Path, tmp_path: Path
) -> None:
    import tiny

    tiny.encoder(tmp_path / "old")
    built = inside("index", "build", str(tmp_path / "index"), str(corpus), "--encoder", str(tmp_path / "old"))
    assert built.returncode == 0, built.stderr
    assert inside("index", "delete", str(tmp_path / "index"), "tax").returncode == 0
    (tmp_path / "old").rename(tmp_path / "new")
    # Run in a subprocess, because this process may cache the encoder.
    refused = cli("index", "compact", str(tmp_path / "index"), "--retrain")
    assert (refused.returncode, "old" in refused.stderr) == (2, True)
    compacted = inside("index", "compact", str(tmp_path / "index"), "--retrain", "--encoder", str(tmp_path / "new"))
    assert compacted.returncode == 0, compacted.stderr
    assert "in 1 segments" in compacted.stderr
    tiny.encoder(tmp_path / "other", seed=1)
    refused = inside("index", "compact", str(tmp_path / "index"), "--retrain", "--encoder", str(tmp_path / "other"))
    assert (refused.returncode, "another encoder" in refused.stderr) == (2, True)


def test_queries_are_read_from_stdin_line_by_line(inside: Callable, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    import io

    folder = str(tmp_path / "index")
    assert inside("index", "build", folder, str(corpus)).returncode == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("tax\n\nbread\n"))
    answer = inside("index", "search", folder, "--json", "-k", "1")
    assert [json.loads(line)["query"] for line in answer.stdout.splitlines()] == ["tax", "bread"]


def write_beir(tmp_path: Path, corpus: Path) -> Path:
    """Write the documents with two queries and their qrels in BEIR's format, and return the folder."""
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    queries = {"1": "fish beside sharks", "2": "when is tax due"}
    (beir / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in queries.items()))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tpilot\t1\n2\ttax\t1\n")
    return beir


def test_eval_tune_and_bench(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    beir = write_beir(tmp_path, corpus)
    folder = str(tmp_path / "index")
    assert inside("index", "build", folder, str(beir / "corpus.jsonl.gz")).returncode == 0
    metrics = json.loads(inside("index", "eval", folder, str(beir), "--json").stdout)
    assert metrics["ndcg@10"] == 1
    assert metrics["queries"] == 2
    answer = inside("index", "tune", folder, str(beir))
    assert "nprobe=4" in answer.stderr
    assert json.loads(inside("index", "stats", folder, "--json").stdout)["settings"]["nprobe"] == 4
    answer = inside(
        "bench", "retrieval", "--data", str(beir), "--arms", "dense,maxsim,xtr", "--out", str(tmp_path / "r.json")
    )
    assert answer.returncode == 0, answer.stderr
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert {r["arm"] for r in records if r["metric"] == "ndcg@10" and r["value"] == 1} == {"dense", "maxsim", "xtr"}


def test_build_of_a_complete_index_resumes(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    folder, bad = str(tmp_path / "index"), tmp_path / "bad.jsonl"
    half = corpus.read_text().splitlines()[:2]
    (tmp_path / "half.jsonl").write_text("\n".join(half))
    assert inside("index", "build", folder, str(tmp_path / "half.jsonl")).returncode == 0
    bad.write_text("\n".join([*half, "{"]))
    answer = inside("index", "build", folder, str(bad), "--resume")
    assert (answer.returncode, "bad.jsonl, record 3" in answer.stderr) == (2, True)
    answer = inside("index", "build", folder, str(corpus), "--resume")
    assert "2 documents added, 4 in all" in answer.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "record 1"),
        ("[]", "record 1: not an object"),
        ('{"id": "a"}', "record 1"),
        ('{"text": "no id"}', "--number-ids"),
        ('{"id": "", "text": "x"}', "record 1"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "'a'"),
        ('{"id": "a", "text": 7}', "record 1"),
        ("", "no documents"),
        ("\n\n", "no documents"),
    ],
)
@pytest.mark.parametrize("shards", ["1", "2"])
def test_failed_build_leaves_nothing(
    inside: Callable, corpus: Path, tmp_path: Path, content: str, reason: str, shards: str
) -> None:
    place, bad = tmp_path / "place", tmp_path / "bad.jsonl"
    place.mkdir()
    bad.write_text(content)
    answer = inside("index", "build", str(place / "index"), str(bad), "--shards", shards)
    assert answer.returncode == 2
    assert answer.stderr.startswith("pilotfish: ") and answer.stderr.count("\n") == 1
    if shards == "1":
        assert reason in answer.stderr
    assert list(place.iterdir()) == []
    answer = inside("index", "build", str(place / "index"), str(corpus), "--shards", shards)
    assert answer.returncode == 0, answer.stderr
    assert [p.name for p in place.iterdir()] == ["index"]
    assert json.loads(inside("index", "search", str(place / "index"), "whale", "--json").stdout)["hits"]


def test_files_are_split_into_chunks(inside: Callable, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / ".git").mkdir()
    (notes / ".git" / "x.md").write_text("hidden")
    (notes / "long.txt").write_text(" ".join(f"sentence number {i}." for i in range(200)))
    (notes / "deep" / "page.html").write_text("<html><script>var x</script><h1>Manta</h1><p>rays &amp; fish</p></html>")
    (notes / "read.md").write_text("# Title\n\nSome *emphasis* here.\n")
    (notes / "paper.pdf").write_bytes(pdf("Plankton feeds whales"))
    folder = str(tmp_path / "index")
    answer = inside("index", "build", folder, str(notes), "--chunk-tokens", "100", "--overlap", "20")
    assert answer.returncode == 0, answer.stderr
    hit = json.loads(inside("index", "search", folder, "manta rays", "--json", "-k", "1").stdout)["hits"][0]
    assert hit["id"] == "deep/page.html#0"
    assert hit["snippet"] == "Manta rays & fish"
    hit = json.loads(inside("index", "search", folder, "whales eat plankton", "--json", "-k", "1").stdout)["hits"][0]
    assert (hit["id"], hit["metadata"]["page"]) == ("paper.pdf#0", 1)
    hits = json.loads(inside("index", "search", folder, "sentence number 150", "--json", "-k", "20").stdout)["hits"]
    assert sum(h["id"].startswith("long.txt#") for h in hits) > 5
    assert not any("hidden" in h["snippet"] or "var x" in h["snippet"] for h in hits)


def pdf(text: str) -> bytes:
    """Return a minimal PDF that contains a text."""
    stream = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET"
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(stream)}>>stream\n{stream}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, offsets = "%PDF-1.4\n", []
    for i, part in enumerate(parts, 1):
        offsets.append(len(body))
        body += f"{i} 0 obj{part}endobj\n"
    table = "".join(f"{p:010} 00000 n \n" for p in offsets)
    end = f"trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF"
    return f"{body}xref\n0 6\n0000000000 65535 f \n{table}{end}".encode()


def test_refuses_wrong_input_in_one_line(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "index")
    assert inside("index", "build", folder, str(corpus)).returncode == 0
    (tmp_path / "empty").mkdir()
    files = {
        "no_id.jsonl": '{"text": "x"}',
        "latin.jsonl": b'{"id": "a", "text": "\xe9"}',
        "number.jsonl": "3",
        "deep.jsonl": "[" * 100_000,
        "x.json": "{}",
        "short.parquet": "PAR1",
        "x.pdf": "no pdf",
        "x.jsonl.gz": b"\x1f\x8b\x08half",
        "wide.csv": "id,text\na,b,c\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    new = str(tmp_path / "new")
    for arguments, message in (
        (("build", folder, str(corpus)), "holds an index already"),
        (("build", new, str(tmp_path / "nothing")), "no such file or folder"),
        (("build", new, str(tmp_path / "empty")), "no files that end in"),
        (("build", new, str(corpus), "--kind", "xtrr"), "did you mean 'xtr'"),
        (("build", new, str(corpus), "--option", "codek=sq4"), "did you mean 'codec'"),
        (("build", new, str(corpus), "--encoder", "minilmm"), "no such folder"),
        (("build", new, str(corpus), "--overlap", "300"), "has to be less than"),
        *((("add", folder, str(tmp_path / name)), name) for name in files),
        (("add", folder, "x.exe"), "no such file"),
        (("search", folder, "x", "--where", "a >>"), "expected a value"),
        (("search", folder, "x", "--set", "nprobe=0"), "expected 1 to"),
        (("search", folder, "x", "--set", "k"), "not of the form key=value"),
        (("search", str(tmp_path), "x"), "there is no index"),
        (("explain", folder, "x", "y"), "no document 'y'"),
        (("delete", folder), "name ids, or give --where"),
        (("eval", folder, str(tmp_path)), "there are no qrels"),
        (("serve", folder, "--host", "0.0.0.0"), "give --token"),
        (("export", folder, str(tmp_path / "no" / "x.faiss")), "x.faiss"),
    ):
        answer = inside("index", *arguments)
        assert answer.returncode == 2, (arguments, answer.stderr)
        assert message in answer.stderr, (arguments, answer.stderr)
        assert answer.stderr.strip().splitlines()[-1].startswith("pilotfish: ")
        assert "Traceback" not in answer.stderr
    assert "4 documents, all right" in inside("index", "check", folder).stdout
    assert not (tmp_path / "new").exists()


def test_index_in_the_same_folder_as_its_documents(
    inside: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that indexes are not read as documents, and that broken links are reported."""
    (tmp_path / "notes.txt").write_text("Sharks and pilot fish.")
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        assert "1 documents added, 1 in all" in inside("index", "build", name, ".").stderr
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    answer = inside("index", "build", "third", ".", "--bad-files", "stop")
    assert (answer.returncode, "is a broken link" in answer.stderr) == (2, True)
    assert not (tmp_path / "third").exists()
    answer = inside("index", "build", "third", ".")
    assert "skipped gone.txt: is a broken link" in answer.stderr
    assert "1 documents added, 1 in all" in answer.stderr


PDF_LOCKED = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Size 2/Root 1 0 R/Encrypt 9 0 R>>\n%%EOF"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bytes.txt", b"\x81\x8d\x00\xff\xfe\x9d\x00\x81" * 4, "not text"),
        ("half.jsonl", b'{"id": "x", "text": "y"}\n{"id": ', "half.jsonl, record 2"),
        ("object.jsonl", b"[1, 2]\n", "record 1: not an object"),
        ("digits.jsonl", b'{"id": "x", "text": "y", "n": ' + b"9" * 5000 + b"}", "record 1"),
        ("list.json", b'[{"id": "x"}]', "record 1"),
        ("broken.jsonl.gz", b"\x1f\x8b\x08half", "broken.jsonl.gz"),
        ("locked.pdf", PDF_LOCKED, "cannot be read as PDF"),
        ("damaged.pdf", b"%PDF-1.7 nothing", "cannot be read as PDF"),
        ("wide.csv", b"id,text\na,b,c\n", "more fields than the header"),
        ("short.parquet", b"PAR1", "short.parquet"),
        ("empty.txt", b"", "no text"),
        ("blank.html", b"<html><body> </body></html>", "no text"),
        ("scan.pdf", None, "1 page, no text layer"),
        ("blank.jsonl", b'{"id": "e", "text": " "}', "1 records without text"),
        (b"na\xffme.txt", b"text", "its name is not UTF-8"),
    ],
)
def test_bad_file_does_not_stop_a_folder(
    inside: Callable, tmp_path: Path, name: str | bytes, content: bytes | None, reason: str
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "good.txt").write_text("Pilot fish swim with sharks.")
    (folder / os.fsdecode(name)).write_bytes(pdf("") if content is None else content)
    answer = inside("index", "build", str(tmp_path / "i"), str(folder), "--kind", "bm25")
    assert answer.returncode == 0, answer.stderr
    (skipped,) = [line for line in answer.stderr.splitlines() if line.startswith("skipped ")]
    assert reason in skipped
    assert "1 documents added, 1 in all" in answer.stderr
    with Index.open(tmp_path / "i") as index:
        assert list(index.ids()) == ["good.txt#0"]
    stopped = inside("index", "build", str(tmp_path / "j"), str(folder), "--kind", "bm25", "--bad-files", "stop")
    harmless = reason in ("no text", "1 page, no text layer", "1 records without text")
    assert stopped.returncode == (0 if harmless else 2), stopped.stderr
    assert (tmp_path / "j").exists() is harmless
    alone = inside("index", "build", str(tmp_path / "k"), str(folder / os.fsdecode(name)), "--kind", "bm25")
    assert (alone.returncode, reason in alone.stderr) == (2, True), alone.stderr
    assert not (tmp_path / "k").exists()


def test_ignored_files(inside: Callable, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    files = (
        "docs/a.md", "docs/draft/b.md", "docs/draft/kept.md", "docs/node_modules/c.md", "docs/build/d.md",
        "docs/old/e.md", "docs/__pycache__/f.txt", "docs/.hidden/g.md",
    )  # fmt: skip
    for file in files:
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("Pilot fish.")
    (repository / ".git").mkdir()
    (repository / ".gitignore").write_text("build/\n*.log\n")
    (repository / "docs" / "draft" / ".gitignore").write_text("*\n!kept.md\n")

    def indexed(name: str, *arguments: str) -> set[str]:
        command = ("build", str(tmp_path / name), str(repository / "docs"), "--kind", "bm25", *arguments)
        assert inside("index", *command).returncode == 0
        with Index.open(tmp_path / name) as index:
            return {i.partition("#")[0] for i in index.ids()}

    assert indexed("i") == {"a.md", "draft/kept.md", "old/e.md"}
    assert indexed("j", "--ignore", "old", "--ignore", "kept.*") == {"a.md"}
    assert "node_modules/c.md" in indexed("k", "--ignore", "!node_modules/")


def test_settings_files_among_documents_are_skipped(inside: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("Pilot fish.")
    (folder / "settings.json").write_text(' {"panels": []}')
    assert inside("index", "build", str(tmp_path / "i"), str(folder), "--kind", "bm25").returncode == 0
    assert list(Index.open(tmp_path / "i").ids()) == ["a.txt#0"]
    named = inside("index", "add", str(tmp_path / "i"), str(folder / "settings.json"))
    assert (named.returncode, "expected a list" in named.stderr) == (2, True), (
        "a file that is named explicitly is not skipped"
    )


def test_tables_written_by_pandas_and_pyarrow(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "pandas.csv").write_text(f",id,text,score\n0,a,{'long ' * 40_000},nan\n1,b,x,2.5\n")
    first, second = list(DocumentSource([tmp_path / "pandas.csv"], lambda text: [text]))
    assert first.metadata == {}
    assert len(first.text) == 200_000
    assert second.metadata == {"score": 2.5}
    columns = {
        "id": ["a", "b"],
        "text": ["x", "y"],
        "when": [datetime.datetime(2020, 1, 2, 3, 4), None],
        "price": [decimal.Decimal("1.50"), decimal.Decimal("2.00")],
        "ratio": [float("nan"), 0.5],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "typed.parquet")
    first, second = list(DocumentSource([tmp_path / "typed.parquet"], lambda text: [text]))
    assert first.metadata == {"when": "2020-01-02T03:04:00", "price": 1.5}
    assert second.metadata == {"price": 2, "ratio": 0.5}


def test_shards_need_a_new_folder(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    single, shards = str(tmp_path / "whole"), str(tmp_path / "shards")
    assert inside("index", "build", single, str(corpus)).returncode == 0
    answer = inside("index", "build", single, str(corpus), "--shards", "2")
    assert (answer.returncode, "holds an index already" in answer.stderr) == (2, True)
    assert inside("index", "build", shards, str(corpus), "--shards", "2").returncode == 0
    assert "4 documents, all right" in inside("index", "check", shards).stdout
    assert '"documents": 4' in inside("index", "stats", shards, "--json").stdout
    answer = inside("index", "compact", shards)
    assert (answer.returncode, "is in shards" in answer.stderr) == (2, True)


def test_refuses_port_in_use_in_one_line(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "index")
    assert inside("index", "build", folder, str(corpus), "--kind", "bm25").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = inside("index", "serve", folder, "--port", str(taken.getsockname()[1]))
    assert answer.returncode == 2
    assert "in use" in answer.stderr.strip()
    assert len(answer.stderr.strip().splitlines()) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]":,idtex\n01 ', max_size=80).map(str.encode)),
    ending=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "pdf", "html", "md", "txt", "jsonl.gz"]),
)
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    try:
        list(DocumentSource([path], lambda text: [text], number_ids=True))
    except RetrievalError as error:
        assert "\n" not in str(error)
