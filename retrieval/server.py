"""HTTP server of an index.

All responses are JSON. Errors have a one-line ``detail``. Searches run concurrently, writes one after the other.
"""

import functools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.convertors import PathConvertor, register_url_convertor

from .errors import DamagedIndex, LockedIndex, NoIndex, RetrievalError
from .http_middleware import LARGEST_BODY, BodyLimit, HeadRequests
from .index import Index
from .malloc_trim import release_memory
from .registry import check_settings
from .request_auth import RequestAuth
from .shards import ShardedIndex
from .sync import SyncReport
from .validation import LONGEST_ID
from .write_queue import SerialExecutor

Name = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Filter = Annotated[str, Field(min_length=1, max_length=10_000, description="year >= 2020 AND lang in (en, de)")]


class DocumentIdConvertor(PathConvertor):
    """Convertor of ids in URL paths: any characters, line breaks included."""

    regex = "(?s:.*)"


register_url_convertor("document_id", DocumentIdConvertor())


class Model(BaseModel):
    """Base class of requests and responses; unknown fields are refused, because they may be misspelt."""

    model_config = ConfigDict(extra="forbid")


class SearchRequest(Model):
    """Search request."""

    query: Annotated[str, Field(max_length=20_000)]
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    where: Filter | None = None
    settings: Annotated[
        dict[str, JsonValue], Field(description="Search settings that override those of the index")
    ] = {}
    text: Annotated[bool, Field(description="Return the full text of each hit in addition to the snippet")] = False


class SearchHit(Model):
    """Search result; ``text`` is null unless the request asks for it."""

    id: str
    score: float
    text: str | None
    snippet: str
    metadata: dict[str, JsonValue]
    source: str | None


class SearchResponse(Model):
    """Hits, best first, and the time of the search."""

    hits: list[SearchHit]
    milliseconds: float


class StoredDocument(Model):
    """Document of the index."""

    id: str
    text: str
    metadata: dict[str, JsonValue]
    source: str | None


class NewDocument(Model):
    """Document to add."""

    id: Name
    text: Annotated[str, Field(max_length=LARGEST_BODY)]
    metadata: dict[str, JsonValue] = {}
    source: Annotated[Name | None, Field(description="File or other origin that the document is a part of")] = None


class AddRequest(Model):
    """Documents to add."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=1000)]
    upsert: Annotated[bool, Field(description="Replace documents whose ids are in the index already")] = False
    replace_sources: Annotated[
        bool, Field(description="Replace all documents of each source; the documents of a source follow each other")
    ] = False


class DeleteRequest(Model):
    """Documents to delete, by id or by filter."""

    ids: Annotated[list[Name], Field(max_length=10_000)] = []
    where: Filter | None = None


class Count(Model):
    """Number of changed documents, and number of documents after the change."""

    changed: int
    documents: int


class Problem(BaseModel):
    """Error message."""

    detail: str


class SyncRequest(Model):
    """Synchronization with the files and folders that the server was started with."""

    dry_run: Annotated[bool, Field(description="Return the differences, and leave the index as it is")] = False


def create_index_app(
    index: Index | ShardedIndex, token: str | None = None, read_only: bool = False, sync_paths: Sequence[str] = ()
) -> FastAPI:
    """Create the application.

    Args:
        index: Index to serve.
        token: Bearer token that clients have to send; None if no token is required.
        read_only: Whether documents cannot be added or deleted; shards are always read-only.
        sync_paths: Files and folders with which clients may synchronize the index; none if empty.
    """
    wrong: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem, "description": text}
        for code, text in (
            (400, "Invalid request"),
            (401, "Token missing or wrong"),
            (403, "Request from another page"),
            (413, "Body too large"),
            (422, "Request does not match the schema"),
            (503, "Index not readable"),
        )
    }
    app = FastAPI(
        title="Pilotfish index",
        description=__doc__,
        responses=wrong,
        version="1",
        swagger_ui_parameters={"docExpansion": "list"},
    )
    registry = CollectorRegistry()
    seconds = Histogram(
        "pilotfish_index_request_seconds", "Time of requests", ["route"], registry=registry, buckets=_BUCKETS
    )
    failed = Counter("pilotfish_index_failures", "Requests that failed", ["route", "status"], registry=registry)
    documents = Gauge("pilotfish_index_documents", "Documents that can be found", registry=registry)
    documents.set_function(lambda: len(index))
    writes = SerialExecutor()
    guard = RequestAuth(token)

    @app.middleware("http")
    async def measured(request: Request, call_next: Any) -> Any:
        if refusal := guard.refusal(request):
            return refusal
        started = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "none")
        response.headers["X-Frame-Options"] = "DENY"
        seconds.labels(route).observe(time.perf_counter() - started)
        if response.status_code >= 400:
            failed.labels(route, str(response.status_code)).inc()
        return response

    answer_errors(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(HeadRequests)

    @app.get("/health", summary="Check that the index can be read")
    def health() -> dict[str, Any]:
        return {"status": "ok", "documents": len(index)}

    @app.get("/stats", dependencies=[Depends(guard.known)], summary="Contents and sizes of the index")
    def stats() -> dict[str, Any]:
        return index.stats()

    @app.get(
        "/metrics",
        dependencies=[Depends(guard.known)],
        response_class=PlainTextResponse,
        summary="Metrics for Prometheus",
    )
    def metrics() -> str:
        return generate_latest(registry).decode()

    @app.post("/search", dependencies=[Depends(guard.known)], summary="Search documents")
    def search(question: SearchRequest) -> SearchResponse:
        started = time.perf_counter()
        hits = index.search(question.query, question.k, question.where, **check_settings(question.settings))
        results = [
            SearchHit(
                id=h.id,
                score=h.score,
                text=h.text if question.text else None,
                snippet=h.snippet,
                metadata=dict(h.metadata),
                source=h.source,
            )
            for h in hits
        ]
        return SearchResponse(hits=results, milliseconds=round(1e3 * (time.perf_counter() - started), 3))

    missing: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such document"}}

    def find(name: str) -> StoredDocument:
        document = index.get(name)
        if document is None:
            raise HTTPException(404, f"there is no document {name!r}")
        return StoredDocument(
            id=document.id, text=document.text, metadata=dict(document.metadata), source=document.source
        )

    @app.get(
        "/documents/{name:document_id}",
        dependencies=[Depends(guard.known)],
        summary="Get a document",
        responses=missing,
    )
    def get(name: Annotated[str, Path(min_length=1, max_length=LONGEST_ID)]) -> StoredDocument:
        return find(name)

    @app.get(
        "/documents",
        dependencies=[Depends(guard.known)],
        summary="Get a document whose id is not the path of a URL, such as ..",
        responses=missing,
    )
    def get_by_query(id: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)]) -> StoredDocument:
        return find(id)

    if not read_only and isinstance(index, Index):
        changes = {409: {"model": Problem, "description": "Another process writes to the index"}}
        changes[507] = {"model": Problem, "description": "Disk full or not writable"}

        async def changed(change: Callable[..., int], *args: Any) -> Count:
            count = await writes(change, *args)
            release_memory()
            return Count(changed=count, documents=len(index))

        @app.post("/documents", dependencies=[Depends(guard.known)], responses=changes, summary="Add documents")  # type: ignore[arg-type]
        async def add(addition: AddRequest) -> Count:
            payload = [d.model_dump() for d in addition.documents]
            add = index.upsert if addition.upsert else index.add
            return await changed(functools.partial(add, replace_sources=addition.replace_sources), payload)

        @app.post("/delete", dependencies=[Depends(guard.known)], responses=changes, summary="Delete documents")  # type: ignore[arg-type]
        async def delete(deletion: DeleteRequest) -> Count:
            if not deletion.ids and deletion.where is None:
                raise HTTPException(400, "name ids, or give a filter in where")
            return await changed(index.delete, deletion.ids, deletion.where)

        if sync_paths:
            add_sync_endpoint(app, "/sync", index, sync_paths, writes, [Depends(guard.known)], changes)

    return app


def add_sync_endpoint(
    app: FastAPI,
    path: str,
    index: Index,
    sync_paths: Sequence[str],
    writes: SerialExecutor,
    dependencies: list[Any],
    responses: dict[Any, Any],
) -> None:
    """Add the endpoint that synchronizes an index with the files and folders that the server was started with."""

    @app.post(path, dependencies=dependencies, responses=responses, summary="Synchronize with files")
    async def sync(request: SyncRequest | None = None) -> SyncReport:
        dry_run = request is not None and request.dry_run
        report = await writes(functools.partial(index.sync, sync_paths, dry_run=dry_run))
        release_memory()
        return report


def _problem(text: str, status: int) -> JSONResponse:
    """Build an error response; lone surrogates, which cannot be encoded, are written as escapes."""
    return JSONResponse({"detail": text.encode("utf-8", "backslashreplace").decode()}, status)


def answer_errors(app: FastAPI) -> None:
    """Register handlers that convert errors to responses with a ``detail``."""

    @app.exception_handler(RetrievalError)
    async def refused(_: Request, error: RetrievalError) -> JSONResponse:
        broken = isinstance(error, DamagedIndex | NoIndex)
        status = 503 if broken else 409 if isinstance(error, LockedIndex) else 400
        return _problem(str(error), status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        # The input is not quoted: it may contain values that JSON cannot represent.
        first = error.errors()[0]
        detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return _problem(detail, 422)

    @app.exception_handler(OSError)
    async def no_room(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"detail": f"the index cannot be written: {error.strerror or error}"}, 507)


_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


def run_server(app: FastAPI, host: str, port: int) -> None:
    """Run the server until it is stopped.

    Raises:
        OSError: The server cannot listen on the address and port.
    """
    config = uvicorn.Config(app, host=host, port=port, log_level="info", server_header=False)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    with listening:
        url = f"http://{host}:{listening.getsockname()[1]}"
        logging.getLogger("uvicorn.error").info("Pilotfish listens at %s", url)
        uvicorn.Server(config).run(sockets=[listening])
