"""The RAG server: answers, uploads, refused requests, and property-based tests from its OpenAPI schema."""

import gzip
import json
import resource
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import language_server
import pytest
import schemathesis
import words
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from language_server import DOCUMENTS, LanguageServer

from pilotfish.integrations.rag.answering import Answerer
from pilotfish.integrations.rag.server import create_rag_app
from pilotfish.retrieval import Index

HERE = "http://localhost"


@pytest.fixture
def client(documents: Index, language: LanguageServer) -> TestClient:
    return TestClient(
        create_rag_app(documents, Answerer(documents, language.url)), base_url=HERE, raise_server_exceptions=False
    )


def ask(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """Post a question to /ask, and return the streamed events."""
    answer = client.post("/ask", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_answer_is_streamed(client: TestClient) -> None:
    passages, *parts, done = ask(client, question="what do pilot fish travel with?")
    assert passages["passages"][0]["id"] == "sharks"
    assert "text" not in passages["passages"][0], "the text of a passage is requested separately"
    assert "".join(t["text"] for t in parts) == done["done"]["text"] == "Pilot fish travel with sharks [1]."
    assert done["done"]["saved"] == {"drafter_accepted_tokens": 3}
    assert (done["done"]["cited"], done["done"]["citations"]) == ([1], [{"begin": 30, "end": 33, "numbers": [1]}])
    (passages, *_) = ask(client, question="sharks", where="kind = 'sky'")
    assert [p["id"] for p in passages["passages"]] == ["moon"]
    assert "error" in ask(client, question="broken sharks")[-1]
    metrics = client.get("/metrics").text
    assert 'pilotfish_rag_answers_total{known="true"} 2.0' in metrics
    assert "pilotfish_rag_failures_total 1.0" in metrics
    assert "pilotfish_rag_running 0.0" in metrics


def test_passage_marks_terms_of_the_question(client: TestClient) -> None:
    payload = client.get("/passage", params={"id": "sharks", "question": "pilot sharks"}).json()
    marked = [payload["text"][m["begin"] : m["end"]].lower() for m in payload["marks"]]
    assert "pilot" in marked, marked
    assert payload["metadata"] == {"year": 2020, "kind": "sea"}
    assert client.get("/passage", params={"id": "nobody", "question": "x"}).status_code == 404


def test_uploads_add_and_replace_documents(client: TestClient, documents: Index) -> None:
    payload = client.post("/documents", params={"name": "cats.txt"}, content="Cats purr. " * 3).json()
    assert payload["added"] == 1 and payload["documents"] == 4
    (id,) = [d.id for d in documents.select("source = 'cats.txt'")]
    assert ask(client, question="cats purr.")[0]["passages"][0]["id"] == id
    client.post("/documents", params={"name": "cats.txt"}, content="Cats sleep.")
    assert [d.text for d in documents.select("source = 'cats.txt'")] == ["Cats sleep."]
    assert client.post("/documents", params={"name": "../../cats.md"}, content="# Cats").json()["added"] == 1
    for name, content, status in (
        ("x.exe", b"MZ", 400),
        ("..", b"x", 400),
        ("x.txt", b"", 400),
        ("x.pdf", b"no pdf", 400),
        ("x.jsonl", b"{", 400),
        ("x" * 300 + ".txt", b"x", 422),
        ("a\0b.txt", b"x", 400),
        ("a\x1b[31m.txt", b"x", 400),
        ("x.parquet", b"PAR1", 400),
        ("x.txt.gz", b"no gzip", 400),
        ("x.txt.gz.gz", gzip.compress(gzip.compress(b"x")), 400),
        ("x.html", b"<![x[ foo", 400),
        ("x.txt.gz", gzip.compress(bytes(300 << 20), 1), 400),
    ):
        answer = client.post("/documents", params={"name": name}, content=content)
        assert answer.status_code == status, (name, answer.text)
        assert isinstance(answer.json()["detail"], str | list)
        assert tempfile.gettempdir() not in answer.text, "the temporary path is not disclosed"
    assert client.post("/documents", params={"name": "魚" * 150 + ".md"}, content="Fish.").json()["added"] == 1
    client.post("/documents", params={"name": "cats.txt.gz"}, content=gzip.compress(b"Cats run."))
    assert [d.text for d in documents.select("source = 'cats.txt'")] == ["Cats run."]


def upload(client: TestClient, name: str, *records: dict[str, Any]) -> Any:
    """Upload ``records`` as a JSON lines file."""
    return client.post("/documents", params={"name": name}, content="".join(json.dumps(r) + "\n" for r in records))


def test_upload_replaces_only_documents_of_the_same_file(client: TestClient, documents: Index) -> None:
    documents.upsert([{"id": "mine", "text": "Mine.", "metadata": {"source": "news.txt", "_upload": "old.txt"}}])
    upload(client, "r.jsonl", {"id": "a", "text": "A."}, {"id": "b", "text": "B."})
    assert upload(client, "r.jsonl", {"id": "b", "text": "New."}, {"text": "Numbered."}).json()["added"] == 2
    assert {d.id: d.text for d in documents.select("_upload = 'r.jsonl'")} == {"b": "New.", "r.jsonl:2": "Numbered."}
    assert client.post("/documents", params={"name": "news.txt"}, content="News.").json()["added"] == 1
    assert "mine" in documents, "documents whose own metadata name the file are kept"
    for name in ("other.jsonl", "news.jsonl"):
        refused = upload(client, name, {"id": "c", "text": "C."}, {"id": "b", "text": "Theirs."})
        assert (refused.status_code, "'b' is in the index already" in refused.text) == (400, True)
    assert upload(client, "m.jsonl", {"id": "mine", "text": "Taken."}).status_code == 400
    texts = {d.id: d.text for d in documents.select()}
    assert "c" not in texts and (texts["mine"], texts["b"]) == ("Mine.", "New.")
    forged = upload(client, "f.jsonl", {"id": "f", "text": "F.", "metadata": {"_upload": "r.jsonl"}})
    assert forged.json()["added"] == 1
    assert "f" in [d.id for d in documents.select("_upload = 'f.jsonl'")], "the upload name in the file is ignored"


@pytest.mark.slow
def test_refuses_decompression_bomb(client: TestClient, tmp_path: Path) -> None:
    """Test that small Parquet files that decompress to hundreds of MiB are refused within bounded memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(text: str, rows: int) -> bytes:
        columns = {"id": [str(i) for i in range(rows)], "text": pa.array([text] * rows)}
        pq.write_table(pa.table(columns), tmp_path / "bomb.parquet", compression="zstd")
        return (tmp_path / "bomb.parquet").read_bytes()

    for content in (table("x" * (40 << 20), 20), table("x" * (200 << 20), 1)):
        assert len(content) < 1 << 20
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused = client.post("/documents", params={"name": "bomb.parquet"}, content=content)
        assert (refused.status_code, "more than 128 MiB" in refused.text) == (400, True)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "less than a GiB, in KiB"
    fine = client.post("/documents", params={"name": "fine.parquet"}, content=table("Sharks swim.", 3))
    assert fine.json()["added"] == 3


def test_uploads_do_not_block_reads(
    documents: Index, language: LanguageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = threading.Event()
    monkeypatch.setattr("pilotfish.integrations.rag.uploads.add_upload", lambda *_: {"added": int(finish.wait(60))})
    app = create_rag_app(documents, Answerer(documents, language.url))
    with language_server.serving(app) as url, ThreadPoolExecutor(60) as pool:
        uploads = [
            pool.submit(httpx.post, f"{url}/documents?name={i}.txt", content="x", timeout=120) for i in range(60)
        ]
        assert httpx.get(f"{url}/passage?id=sharks&question=x", timeout=50).status_code == 200
        assert not any(s.done() for s in uploads)
        finish.set()
        assert {s.result().status_code for s in uploads} == {200}


def test_refuses_cross_site_requests(client: TestClient, documents: Index) -> None:
    count = len(documents)
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/documents?name=a.txt", content="x", headers=headers).status_code == 403
        assert client.post("/ask", json={"question": "x"}, headers=headers).status_code == 403
        assert client.get("/passage?id=sharks&question=x", headers=headers).status_code == 403
    assert len(documents) == count
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_unexpected_errors_are_counted_and_reported(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answerer, "retrieve", lambda *_: 1 / 0)
    assert "see the server's log" in ask(client, question="sharks")[-1]["error"]
    assert "pilotfish_rag_failures_total 1.0" in client.get("/metrics").text


def test_page_has_content_security_policy(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("app.js", "style.css", "icon.svg"):
        assert client.get(f"/page/{name}").status_code == 200
    assert client.get("/page/..%2fserver.py").status_code == 404
    script = client.get("/page/app.js").text
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "eval(" not in script


def test_token_is_required(documents: Index, language: LanguageServer) -> None:
    client = TestClient(create_rag_app(documents, Answerer(documents, language.url), token="secret", read_only=True))
    assert client.get("/").status_code == client.get("/health").status_code == 200
    for path in ("/status", "/metrics"):
        assert client.get(path).status_code == 401
    assert client.post("/ask", json={"question": "x"}).status_code == 401
    authorized = {"Authorization": "Bearer secret"}
    assert client.get("/status", headers=authorized).json()["uploads"] is False
    assert client.post("/documents", params={"name": "a.txt"}, content="x", headers=authorized).status_code in (
        404,
        405,
    )


def test_refuses_invalid_questions(client: TestClient) -> None:
    for body, status, message in (
        ({"question": ""}, 422, "at least 1"),
        ({"question": " \n"}, 422, "at least 1"),
        ({"question": "x", "where": "year <"}, 400, "expected a value"),
        ({"question": "x", "wher": "y"}, 422, "wher"),
        ({}, 422, "question"),
    ):
        answer = client.post("/ask", json=body)
        assert answer.status_code == status, answer.text
        assert message in answer.text


def schema() -> Any:
    """Return the OpenAPI schema of an application whose language model server cannot be reached."""
    words.use()
    index = Index.create(
        Path(tempfile.mkdtemp(prefix="pilotfish-test-")) / "index", encoder="words", options={"dimension": 0}
    )
    index.add([{"id": i, "text": t, "metadata": m} for i, t, m in DOCUMENTS])
    app = create_rag_app(index, Answerer(index, "http://127.0.0.1:9/v1"))
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})


SCHEMA = schema()


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])  # type: ignore[arg-type]
def test_every_valid_request_gets_a_documented_response(case: Any) -> None:
    response = case.call(headers={"Host": "localhost"})
    assert response.status_code != 403
    assert response.status_code < 500, response.text
    case.validate_response(response, checks=(schemathesis.checks.not_a_server_error,))


def test_unreachable_language_server_is_reported(documents: Index) -> None:
    with language_server.running() as server:
        url = server.url
    client = TestClient(create_rag_app(documents, Answerer(documents, url)), base_url=HERE)
    assert "no server answers" in ask(client, question="sharks")[-1]["error"]
