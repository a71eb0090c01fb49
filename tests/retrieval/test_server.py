"""Tests of the index server: its answers and errors, and any request that its OpenAPI schema allows."""

import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import schemathesis
import words
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings

from pilotfish.retrieval import Index
from pilotfish.retrieval.server import create_index_app

HERE = "http://localhost"


@pytest.fixture
def index(create) -> Index:
    created = create(dimension=0)
    created.add([{"id": f"d/{i}", "text": f"word{i} in text", "metadata": {"n": i}} for i in range(20)])
    return created


@pytest.fixture
def client(index: Index) -> TestClient:
    return TestClient(create_index_app(index), base_url=HERE, raise_server_exceptions=False)


def test_documents_are_added_searched_and_deleted(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "documents": 20}
    hits = client.post("/search", json={"query": "word3", "k": 1}).json()["hits"]
    assert (hits[0]["id"], hits[0]["metadata"]) == ("d/3", {"n": 3})
    assert client.post("/search", json={"query": "word3", "where": "n > 17"}).json()["hits"][0]["id"] in (
        "d/18",
        "d/19",
    )
    added = client.post("/documents", json={"documents": [{"id": "new", "text": "brand new"}]})
    assert added.json() == {"changed": 1, "documents": 21}
    assert client.post("/search", json={"query": "brand new", "k": 1}).json()["hits"][0]["id"] == "new"
    assert client.get("/documents/d/3").json()["text"] == "word3 in text"
    assert client.post("/delete", json={"ids": ["new", "nobody"], "where": "n < 5"}).json() == {
        "changed": 6,
        "documents": 15,
    }
    assert client.get("/documents/new").status_code == 404
    assert client.get("/stats").json()["documents"] == 15
    assert "pilotfish_index_documents 15.0" in client.get("/metrics").text
    assert client.get("/docs").status_code == 200


def test_refuses_wrong_requests(client: TestClient, index: Index) -> None:
    for call, status, message in (
        (("/search", {"query": "x", "where": "n >"}), 400, "expected a value"),
        (("/search", {"query": "x", "settings": {"nprobs": 1}}), 400, "did you mean 'nprobe'"),
        (("/search", {"query": "x", "settings": {"k": 1}}), 400, "not a setting; pass it separately"),
        (("/search", {"query": "x", "kk": 1}), 422, "kk"),
        (("/search", {"query": "x", "k": 0}), 422, "greater than"),
        (("/documents", {"documents": [{"id": "d/1", "text": "x"}]}), 400, "is in the index already"),
        (("/documents", {"documents": []}), 422, "at least 1"),
        (("/delete", {}), 400, "name ids"),
    ):
        answer = client.post(call[0], json=call[1])
        assert answer.status_code == status, answer.text
        assert message in answer.text
    assert client.post("/search", content=b"x" * (17 << 20)).status_code == 413
    index._store.lock_timeout = 0
    with index._store.writer():
        answer = client.post("/delete", json={"ids": ["d/1"]})
    assert (answer.status_code, "writes to this index" in answer.text) == (409, True)


def test_refuses_requests_of_other_pages(client: TestClient) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.get("/documents/d/1", headers=headers).status_code == 403
        assert (
            client.post("/documents", json={"documents": [{"id": "x", "text": "x"}]}, headers=headers).status_code
            == 403
        )
        assert client.post("/delete", json={"ids": ["d/1"]}, headers=headers).status_code == 403
    assert client.get("/health").json()["documents"] == 20


def test_requires_token(index: Index) -> None:
    client = TestClient(create_index_app(index, token="secret", read_only=True))
    assert client.get("/health").status_code == 200
    assert client.post("/search", json={"query": "x"}).status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/stats", headers={"Authorization": "Bearer wrong"}).status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert client.post("/search", json={"query": "word3", "k": 1}, headers=right).json()["hits"][0]["id"] == "d/3"
    assert client.post("/delete", json={"ids": ["d/1"]}, headers=right).status_code == 404  # read only


def test_concurrent_searches_and_writes(client: TestClient) -> None:
    def ask(i: int) -> Any:
        if i % 4 == 0:
            body = {"documents": [{"id": f"n{i}", "text": f"new{i}"}], "upsert": True}
            return client.post("/documents", json=body).status_code
        return client.post("/search", json={"query": f"word{i % 20}"}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(80))) == {200}
    assert client.get("/health").json()["documents"] == 40


def schema() -> Any:
    """Return the OpenAPI schema of an application with a small temporary index."""
    import tempfile
    from pathlib import Path

    words.use()
    folder = Path(tempfile.mkdtemp(prefix="pilotfish-test-")) / "index"
    created = Index.create(folder, encoder="words", options={"dimension": 0})
    created.add([{"id": f"d{i}", "text": f"word{i}", "metadata": {"n": i}} for i in range(5)])
    return schemathesis.openapi.from_asgi("/openapi.json", create_index_app(created), headers={"Host": "localhost"})


SCHEMA = schema()


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])  # type: ignore[arg-type]
def test_any_request_gets_no_server_error(case: Any) -> None:
    response = case.call(headers={"Host": "localhost"})
    assert response.status_code != 403
    assert response.status_code < 500, response.text
    case.validate_response(response, checks=(schemathesis.checks.not_a_server_error,))


def test_refuses_json_values_that_cannot_be_encoded(client: TestClient) -> None:
    for path, body in (
        ("/search", '{"query": "a", "k": 1e400}'),
        ("/search", '{"query": "a", "k": NaN}'),
        ("/search", '{"query": "\\ud800"}'),
        ("/search", '{"query": "a", "settings": {"\\ud800": 1}}'),
        ("/search", '{"query": "a", "settings": {"self": 1}}'),
        ("/documents", '{"documents": [{"id": "a", "text": "\\ud800"}]}'),
        ("/delete", '{"ids": ["\\ud800"]}'),
    ):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (body, answer.text)
        assert isinstance(answer.json()["detail"], str)


def test_long_documents_are_found_by_a_snippet_and_fetched_whole(create) -> None:
    index = create(kind="bm25")
    text = "filler words of a long report " * 50_000 + "the needle is here"
    client = TestClient(create_index_app(index), base_url=HERE, raise_server_exceptions=False)
    assert client.post("/documents", json={"documents": [{"id": "long", "text": text}]}).status_code == 200
    hit = client.post("/search", json={"query": "needle"}).json()["hits"][0]
    assert (hit["text"], "needle" in hit["snippet"], len(hit["snippet"]) < 300) == (None, True, True)
    times = [client.post("/search", json={"query": "needle"}).json()["milliseconds"] for _ in range(5)]
    assert min(times) < 500  # 12 ms on the developers' machine
    assert client.post("/search", json={"query": "needle", "text": True}).json()["hits"][0]["text"] == text
    assert client.get("/documents/long").json()["text"] == text
    head = client.head("/documents/long")
    assert (head.status_code, head.content, int(head.headers["content-length"]) > len(text)) == (200, b"", True)


IDS = [
    "a/b",
    "/abs",
    "a?b=c",
    "a#1",
    "a%2Fb",
    "..",
    ".",
    "a/../b",
    "é ü",
    "line\nbreak",
    "tab\t",
    "nul\0",
    "x" * 4096,
    "+",
    " ",
]


@pytest.mark.parametrize("name", IDS, ids=ascii)
def test_every_id_that_is_accepted_can_be_fetched(client: TestClient, name: str) -> None:
    added = client.post("/documents", json={"documents": [{"id": name, "text": "x"}]})
    assert added.status_code == 200, added.text
    assert client.get("/documents", params={"id": name}).json()["id"] == name
    # Clients resolve dots before they send a URL, and starlette's test client decodes percent signs twice.
    if name not in (".", "..", "a/../b", "a%2Fb"):
        assert client.get(f"/documents/{urllib.parse.quote(name, safe='')}").json()["id"] == name
    assert client.post("/delete", json={"ids": [name]}).json()["changed"] == 1
