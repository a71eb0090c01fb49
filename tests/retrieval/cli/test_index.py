"""Tests of `pilotfish index` with the embedded encoder, in subprocesses; most refused inputs run in this process."""

import csv
import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

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
def test_build_search_update_check_and_export(
    cli: Callable, preloaded_cli: Callable, corpus: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "index")
    answer = cli("index", "build", folder, str(corpus))
    assert answer.returncode == 0, answer.stderr
    assert "4 documents added, 4 in all" in answer.stderr
    answer = cli("index", "search", folder, "who follows sharks?", "--json", "-k", "2")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["hits"][0]["id"] == "pilot"
    answer = preloaded_cli("index", "search", folder, "who", "follows", "sharks?", "--where", "year < 2020")
    assert "shark" in answer.stdout
    assert "pilot" not in answer.stdout
    more = tmp_path / "more.csv"
    with more.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [["id", "text", "year"], ["ray", "Manta rays filter plankton.", "2024"], ["tax", "Taxes, anew.", ""]]
        )
    assert "'tax' is in the index already" in preloaded_cli("index", "add", folder, str(more)).stderr
    assert "2 documents added, 5 in all" in preloaded_cli("index", "add", folder, str(more), "--upsert").stderr
    answer = preloaded_cli("index", "delete", folder, "brot", "--where", "year = 2019")
    assert "2 documents deleted, 3 left" in answer.stderr
    answer = preloaded_cli("index", "explain", folder, "manta plankton", "ray", "--json")
    matched = {r["query"]: r["document"] for r in json.loads(answer.stdout)}
    assert matched["plank"] == "plank"
    assert preloaded_cli("index", "compact", folder).returncode == 0
    assert "3 documents, all right" in preloaded_cli("index", "check", folder).stdout
    stats = json.loads(preloaded_cli("index", "stats", folder, "--json").stdout)
    assert (stats["documents"], stats["deleted"], stats["segments"]) == (3, 0, 1)
    answer = preloaded_cli("index", "export", folder, str(tmp_path / "tokens.faiss"))
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
def test_terms_are_explained_and_boosted(
    preloaded_cli: Callable, inside: Callable, corpus: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "words")
    assert "4 documents added" in preloaded_cli("index", "build", folder, str(corpus), "--kind", "vdr").stderr
    query = "who follows sharks?"
    page = tmp_path / "why.html"
    answer = preloaded_cli("index", "explain", folder, query, "pilot", "--html", str(page))
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
def test_encoder_is_trained_and_used(preloaded_cli: Callable, inside: Callable, corpus: Path, tmp_path: Path) -> None:
    import tiny

    tiny.encoder(tmp_path / "base")
    (tmp_path / "text.txt").write_text(
        " ".join(f"W{i % 150} w{i % 7} pilot fish w{i % 31} and more." for i in range(900))
    )
    options = ("--text", str(tmp_path / "text.txt"), "--base", str(tmp_path / "base"), "--steps", "3", "--batch", "8")
    out = tmp_path / "made"
    answer = preloaded_cli("train", "vdr", str(out), *options)
    assert answer.returncode == 0, answer.stderr
    assert (out / "training" / "curve.png").exists()
    assert preloaded_cli("train", "vdr", str(out), *options).returncode == 2
    answer = preloaded_cli("index", "build", str(tmp_path / "i"), str(corpus), "--kind", "vdr", "--encoder", str(out))
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
        ("", "bad.jsonl: no records"),
        ("\n\n", "bad.jsonl: no records"),
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
    (tmp_path / "y.faiss.documents.jsonl").mkdir()
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
        (("export", folder, str(tmp_path / "y.faiss")), "y.faiss.documents.jsonl"),
    ):
        answer = inside("index", *arguments)
        assert answer.returncode == 2, (arguments, answer.stderr)
        assert message in answer.stderr, (arguments, answer.stderr)
        assert answer.stderr.strip().splitlines()[-1].startswith("pilotfish: ")
        assert "Traceback" not in answer.stderr
    assert "4 documents, all right" in inside("index", "check", folder).stdout
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "y.faiss").exists(), "an index without the ids of its documents"


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
