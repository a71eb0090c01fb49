"""Tests that a server without a token refuses requests from other web pages in a browser on the same machine."""

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from pilotfish.retrieval.request_auth import RequestAuth


def make_client(token: str | None = None) -> TestClient:
    app, guard = FastAPI(), RequestAuth(token)

    @app.middleware("http")
    async def guarded(request, call_next):
        return guard.refusal(request) or await call_next(request)

    @app.api_route("/", methods=["GET", "POST"], dependencies=[Depends(guard.known)])
    def root() -> str:
        return "secret"

    return TestClient(app, base_url="http://localhost:8090")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "a.localhost", "127.0.0.1:8090", "[::1]:8090", "10.1.2.3"]
)
def test_local_host_names_and_addresses_are_served(host: str) -> None:
    assert make_client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8090",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        ":80",
        "[::1",
        "1.2.3",
    ],
)
def test_refuses_other_host_names(host: str) -> None:
    answer = make_client().get("/", headers={"Host": host})
    assert (answer.status_code, "secret" in answer.text) == (403, False)
    assert "Host" in answer.json()["detail"] and "token" in answer.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:3000"},  # another server on this machine
        {"Origin": "http://localhost:8090.evil.example"},
        {"Origin": "http://user@localhost:8090"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_refuses_other_origins(headers: dict[str, str]) -> None:
    for method in ("GET", "POST"):
        assert make_client().request(method, "/", headers=headers).status_code == 403
    assert make_client("t").post("/", headers={**headers, "Authorization": "Bearer t"}).status_code == 200


def test_same_origin_requests_and_links_are_served() -> None:
    same_origin = {"Origin": "http://localhost:8090", "Sec-Fetch-Site": "same-origin"}
    assert make_client().post("/", headers=same_origin).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert make_client().get("/", headers=link).status_code == 200
    assert make_client().post("/", headers=link).status_code == 403, "a form of another page"
    assert make_client().get("/", headers={**link, "Sec-Fetch-Dest": "document"}).status_code == 200
    assert make_client().get("/", headers={**link, "Sec-Fetch-Dest": "iframe"}).status_code == 403


def test_refuses_wrong_tokens() -> None:
    for given in ("Bearer", "Bearer wrong", "Bearer tt", "Basic t", "Bearer \u00e9".encode()):
        assert make_client("t").get("/", headers={"Authorization": given}).status_code == 401
    assert make_client("t").get("/", headers={"Authorization": "Bearer t", "Host": "any.example"}).status_code == 200
