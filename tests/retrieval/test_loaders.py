"""Tests of documents read from files and folders: formats, chunks, bad files and ignored files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index, RetrievalError
from pilotfish.retrieval.loaders import DocumentSource


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


def documents(path: Path) -> list[tuple[str, str, Any]]:
    """Return id, text and metadata of the documents of a file."""
    return [(d.id, d.text, d.metadata) for d in DocumentSource([path], lambda text: [text])]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"_id": None, "id": "a"}, "a"),
        ({"_id": "a", "id": "b"}, "a"),
        ({"_id": "a", "id": None}, "a"),
        ({"_id": 0, "id": "b"}, "0"),
    ],
)
def test_null_id_does_not_hide_the_other_key(tmp_path: Path, record: dict, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**record, "text": "x"}))
    assert documents(tmp_path / "a.jsonl") == [(expected, "x", {})]


def test_nanoseconds_of_parquet_timestamps_are_truncated(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    when = pyarrow.array([1_577_934_240_123_456_789, None], pyarrow.timestamp("ns"))
    table = pyarrow.table({"id": ["a", "b"], "text": ["x", "y"], "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == [
        ("a", "x", {"when": "2020-01-02T03:04:00.123456"}),
        ("b", "y", {}),
    ]


def test_surrogates_of_pdf_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that whole pairs become characters, and that halves are replaced."""
    import pypdf

    (tmp_path / "a.pdf").write_bytes(pdf("x"))
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda _: "fish \ud83d\udc1f and \ud83d half")
    assert [text for _, text, _ in documents(tmp_path / "a.pdf")] == [
        "fish \N{FISH} and \N{REPLACEMENT CHARACTER} half"
    ]


def test_integers_of_thousands_of_digits_are_reported_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "y", "n": ' + "9" * 5000 + "}")
    with pytest.raises(RetrievalError, match=r"^a\.jsonl, record 2: "):
        documents(tmp_path / "a.jsonl")


def test_columns_that_metadata_cannot_hold_are_left_out_with_a_note(tmp_path: Path) -> None:
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array(["a", "b"]),
        "text": pa.array(["one", "two"]).dictionary_encode(),
        "blob": pa.array([b"\xff", None]),
        "pairs": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "span": pa.array([1, 2], pa.duration("s")),
        "nested": pa.array([{"x": [1, 2]}, {"x": []}]),
        "inner": pa.array([[b"a"], []], pa.list_(pa.binary())),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "none": pa.nulls(2),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = DocumentSource([tmp_path / "t.parquet"], lambda text: [text], skip_bad=True)
    first, _ = list(source)
    assert (first.id, first.text, first.metadata["nested"]) == ("a", "one", {"x": [1, 2]})
    assert set(first.metadata) == {"nested", "price"}
    assert float(first.metadata["price"]) == 1.5
    note = source.skipped["t.parquet"]
    assert all(name in note for name in ("blob (binary)", "pairs (map", "span (duration", "inner (list"))
