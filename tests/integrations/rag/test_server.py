"""The page's server: what it answers, what it refuses, any request that its own description allows."""

import gzip
import json
import resource
import tempfile
import time
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


def asked(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    answer = client.post("/ask", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_an_answer_is_streamed(client: TestClient) -> None:
    found, *texts, done = asked(client, question="what do pilot fish travel with?")
    assert found["passages"][0]["id"] == "sharks"
    assert "text" not in found["passages"][0], "passages are asked for one by one"
    assert "".join(t["text"] for t in texts) == done["done"]["text"] == "Pilot fish travel with sharks [1]."
    assert done["done"]["saved"] == {"drafter_accepted_tokens": 3}
    assert (done["done"]["cited"], done["done"]["citations"]) == ([1], [{"begin": 30, "end": 33, "numbers": [1]}])
    (found, *_) = asked(client, question="sharks", where="kind = 'sky'")
    assert [p["id"] for p in found["passages"]] == ["moon"]
    assert "error" in asked(client, question="broken sharks")[-1]
    metrics = client.get("/metrics").text
    assert 'pilotfish_rag_answers_total{known="true"} 2.0' in metrics
    assert "pilotfish_rag_failures_total 1.0" in metrics
    assert "pilotfish_rag_running 0.0" in metrics


def test_a_passage_shows_what_met_the_question(client: TestClient) -> None:
    told = client.get("/passage", params={"id": "sharks", "question": "pilot sharks"}).json()
    marked = [told["text"][m["begin"] : m["end"]].lower() for m in told["marks"]]
    assert "pilot" in marked, marked
    assert told["metadata"] == {"year": 2020, "kind": "sea"}
    assert client.get("/passage", params={"id": "nobody", "question": "x"}).status_code == 404


def test_documents_are_uploaded_and_replaced(client: TestClient, documents: Index) -> None:
    told = client.post("/documents", params={"name": "cats.txt"}, content="Cats purr. " * 3).json()
    assert told["added"] == 1 and told["documents"] == 4
    (id,) = [d.id for d in documents.select("source = 'cats.txt'")]
    assert asked(client, question="cats purr.")[0]["passages"][0]["id"] == id
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
        assert tempfile.gettempdir() not in answer.text, "where it lay meanwhile is nobody's business"
    assert client.post("/documents", params={"name": "魚" * 150 + ".md"}, content="Fish.").json()["added"] == 1
    client.post("/documents", params={"name": "cats.txt.gz"}, content=gzip.compress(b"Cats run."))
    assert [d.text for d in documents.select("source = 'cats.txt'")] == ["Cats run."]


def upload(client: TestClient, name: str, *records: dict[str, Any]) -> Any:
    return client.post("/documents", params={"name": name}, content="".join(json.dumps(r) + "\n" for r in records))


def test_a_file_replaces_what_came_by_its_name_and_nothing_else(client: TestClient, documents: Index) -> None:
    documents.upsert([{"id": "mine", "text": "Mine.", "metadata": {"source": "news.txt", "_upload": "old.txt"}}])
    upload(client, "r.jsonl", {"id": "a", "text": "A."}, {"id": "b", "text": "B."})
    assert upload(client, "r.jsonl", {"id": "b", "text": "New."}, {"text": "Numbered."}).json()["added"] == 2
    assert {d.id: d.text for d in documents.select("_upload = 'r.jsonl'")} == {"b": "New.", "r.jsonl:2": "Numbered."}
    assert client.post("/documents", params={"name": "news.txt"}, content="News.").json()["added"] == 1
    assert "mine" in documents, "whose own metadata name that file"
    for name in ("other.jsonl", "news.jsonl"):
        refused = upload(client, name, {"id": "c", "text": "C."}, {"id": "b", "text": "Theirs."})
        assert (refused.status_code, "'b' is in the index already" in refused.text) == (400, True)
    assert upload(client, "m.jsonl", {"id": "mine", "text": "Taken."}).status_code == 400
    texts = {d.id: d.text for d in documents.select()}
    assert "c" not in texts and (texts["mine"], texts["b"]) == ("Mine.", "New.")
    forged = upload(client, "f.jsonl", {"id": "f", "text": "F.", "metadata": {"_upload": "r.jsonl"}})
    assert forged.json()["added"] == 1
    assert "f" in [d.id for d in documents.select("_upload = 'f.jsonl'")], "what the file says of that is not believed"


def test_a_table_that_unfolds_is_refused(client: TestClient, tmp_path: Path) -> None:
    """Nine kilobytes that say the same ninety megabytes again and again."""
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


def test_many_uploads_leave_room_for_readers(
    documents: Index, language: LanguageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.integrations.rag.uploads.add_upload", lambda *_: (time.sleep(0.05), {"added": 1})[1])
    app = create_rag_app(documents, Answerer(documents, language.url))
    with language_server.serving(app) as url, ThreadPoolExecutor(60) as pool:
        sent = [pool.submit(httpx.post, f"{url}/documents?name={i}.txt", content="x", timeout=60) for i in range(60)]
        begun = time.monotonic()
        assert httpx.get(f"{url}/passage?id=sharks&question=x", timeout=60).status_code == 200
        assert time.monotonic() - begun < 2
        assert {s.result().status_code for s in sent} == {200}


def test_other_pages_get_nothing(client: TestClient, documents: Index) -> None:
    count = len(documents)
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/documents?name=a.txt", content="x", headers=headers).status_code == 403
        assert client.post("/ask", json={"question": "x"}, headers=headers).status_code == 403
        assert client.get("/passage?id=sharks&question=x", headers=headers).status_code == 403
    assert len(documents) == count
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_what_nobody_foresaw_is_counted_and_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answerer, "retrieve", lambda *_: 1 / 0)
    assert "the server's log says why" in asked(client, question="sharks")[-1]["error"]
    assert "pilotfish_rag_failures_total 1.0" in client.get("/metrics").text


def test_the_page_runs_nothing_of_strangers(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("app.js", "style.css", "icon.svg"):
        assert client.get(f"/page/{name}").status_code == 200
    assert client.get("/page/..%2fserver.py").status_code == 404
    script = client.get("/page/app.js").text
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "eval(" not in script


def test_a_token_is_asked_for(documents: Index, language: LanguageServer) -> None:
    client = TestClient(create_rag_app(documents, Answerer(documents, language.url), token="secret", read_only=True))
    assert client.get("/").status_code == client.get("/health").status_code == 200
    for path in ("/status", "/metrics"):
        assert client.get(path).status_code == 401
    assert client.post("/ask", json={"question": "x"}).status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert client.get("/status", headers=right).json()["uploads"] is False
    assert client.post("/documents", params={"name": "a.txt"}, content="x", headers=right).status_code in (404, 405)


def test_what_is_wrong_is_refused(client: TestClient) -> None:
    for body, status, told in (
        ({"question": ""}, 422, "at least 1"),
        ({"question": " \n"}, 422, "at least 1"),
        ({"question": "x", "where": "year <"}, 400, "expected a value"),
        ({"question": "x", "wher": "y"}, 422, "wher"),
        ({}, 422, "question"),
    ):
        answer = client.post("/ask", json=body)
        assert answer.status_code == status, answer.text
        assert told in answer.text


def schema() -> Any:
    """The application's own description; nobody answers where its language model should be."""
    words.use()
    made = Index.create(
        Path(tempfile.mkdtemp(prefix="pilotfish-test-")) / "index", encoder="words", options={"dimension": 0}
    )
    made.add([{"id": i, "text": t, "metadata": m} for i, t, m in DOCUMENTS])
    app = create_rag_app(made, Answerer(made, "http://127.0.0.1:9/v1"))
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})


SCHEMA = schema()


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])  # type: ignore[arg-type]
def test_any_request_has_an_answer_that_is_described(case: Any) -> None:
    response = case.call(headers={"Host": "localhost"})
    assert response.status_code != 403
    assert response.status_code < 500, response.text
    case.validate_response(response, checks=(schemathesis.checks.not_a_server_error,))


def test_language_servers_of_tests_end(documents: Index) -> None:
    with language_server.running() as server:
        url = server.url
    client = TestClient(create_rag_app(documents, Answerer(documents, url)), base_url=HERE)
    assert "no server answers" in asked(client, question="sharks")[-1]["error"]
