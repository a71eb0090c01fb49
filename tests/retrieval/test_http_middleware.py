"""Tests of HEAD requests and of the limit of request bodies."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from pilotfish.retrieval.http_middleware import LARGEST_BODY, BodyLimit, HeadRequests


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(BodyLimit)
    app.add_middleware(HeadRequests)

    @app.get("/")
    def root() -> str:
        return "hello"

    @app.post("/")
    async def size(request: Request) -> int:
        return len(await request.body())

    return TestClient(app)


def chunks(size: int) -> Iterator[bytes]:
    for begin in range(0, size, 1 << 20):
        yield b"x" * min(1 << 20, size - begin)


@pytest.mark.parametrize("size", [0, 1, 3 << 20, LARGEST_BODY])
def test_bodies_are_read_with_a_length_and_in_chunks(client: TestClient, size: int) -> None:
    assert client.post("/", content=b"x" * size).json() == size
    assert client.post("/", content=chunks(size)).json() == size


@pytest.mark.parametrize("length", [str(LARGEST_BODY + 1), "-1", "x", "9" * 5000, "\u00b2".encode("latin-1")])
def test_refuses_a_length_that_is_too_large_or_invalid(client: TestClient, length: str | bytes) -> None:
    answer = client.post("/", headers={"Content-Length": length})
    assert (answer.status_code, "larger than" in answer.json()["detail"]) == (413, True)


def test_refuses_chunks_that_are_too_large(client: TestClient) -> None:
    assert client.post("/", content=chunks(LARGEST_BODY + 1)).status_code == 413


def test_head_has_the_headers_of_get_and_no_body(client: TestClient) -> None:
    get, head = client.get("/"), client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"] == "7"
    assert client.head("/nothing").status_code == 404
