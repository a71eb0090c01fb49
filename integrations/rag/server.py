"""The web application: streamed answers, their supporting passages, and uploads of documents."""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import StringConstraints

from ...plugins.config import ConfigError
from ...retrieval import highlights
from ...retrieval.errors import RetrievalError
from ...retrieval.http_middleware import BodyLimit, HeadRequests
from ...retrieval.index import Index
from ...retrieval.record_files import RECORDS
from ...retrieval.request_auth import RequestAuth
from ...retrieval.server import Filter, Model, add_sync_endpoint, answer_errors
from ...retrieval.text_files import TEXTS
from ...retrieval.validation import LONGEST_ID
from ...retrieval.write_queue import SerialExecutor
from . import uploads
from .answering import AnswerDone, Answerer, AnswerText, PassagesFound

logger = logging.getLogger("uvicorn.error")
PAGE = Path(__file__).parent / "page"
FILES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class QuestionBody(Model):
    """The body of a request for an answer."""

    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4_000)]
    where: Filter | None = None


def create_rag_app(
    index: Index,
    answerer: Answerer,
    token: str | None = None,
    read_only: bool = False,
    sync_paths: Sequence[str] = (),
) -> FastAPI:
    """Create the web application.

    Args:
        index: Index of the documents.
        answerer: Answerer on the same index.
        token: Bearer token that clients must send; None for no access control.
        read_only: Whether uploads are disabled.
        sync_paths: Files and folders with which clients may synchronize the index; none if empty.
    """

    @asynccontextmanager
    async def connected(_: FastAPI) -> AsyncIterator[None]:
        yield
        await answerer.close()

    app = FastAPI(title="Pilotfish RAG", description=__doc__, version="1", lifespan=connected)
    answer_errors(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(HeadRequests)
    guard, writes, count = RequestAuth(token), SerialExecutor(), _Counters(index)

    @app.exception_handler(ConfigError)
    async def refused(_: Request, error: ConfigError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 502)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:
        if refusal := guard.refusal(request):
            return refusal
        response = await call_next(request)
        response.headers["X-Frame-Options"] = "DENY"
        for name, value in HEADERS.items():
            if not request.url.path.startswith(
                ("/docs", "/redoc")
            ):  # FastAPI's documentation pages load scripts from other hosts
                response.headers.setdefault(name, value)
        return response

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, "there is no such file")
        return FileResponse(PAGE / name, media_type=FILES[name])

    @app.get("/health", summary="Check that the index can be read")
    def health() -> dict[str, Any]:
        return {"status": "ok", "documents": len(index)}

    @app.get(
        "/metrics",
        dependencies=[Depends(guard.known)],
        response_class=PlainTextResponse,
        summary="Metrics for Prometheus",
    )
    def metrics() -> str:
        return count.text()

    @app.get("/status", dependencies=[Depends(guard.known)], summary="Number of documents, model, and active plugins")
    async def status() -> dict[str, Any]:
        counters = await answerer.counters()
        return {
            "documents": len(index),
            "kind": index.kind.name,
            "model": answerer.model,
            "plugins": list(counters.plugins) if counters is not None else [],
            "threshold": answerer.threshold,
            "uploads": not read_only,
            "endings": sorted([*RECORDS, *TEXTS, ".gz"]),
        }

    @app.post("/ask", dependencies=[Depends(guard.known)], summary="Answer a question, streamed as lines of JSON")
    async def ask(question: QuestionBody) -> StreamingResponse:
        if question.where is not None:
            index.count(question.where)  # validates the filter before the stream begins

        async def lines() -> AsyncIterator[str]:
            with count.asking():
                try:
                    async for event in answerer.answer(question.question, (), question.where):
                        yield _line(event, count)
                except (RetrievalError, ConfigError) as error:
                    count.failed.inc()
                    yield json.dumps({"error": str(error)}) + "\n"
                except Exception:  # the stream has begun, so the HTTP status cannot change
                    count.failed.inc()
                    logger.exception("pilotfish: an answer failed")
                    yield json.dumps({"error": "the answer failed; see the server's log"}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    @app.get("/passage", dependencies=[Depends(guard.known)], summary="A passage, with its matches of the question")
    def passage(
        id: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)],
        question: Annotated[str, Query(max_length=4_000)],
    ) -> dict[str, Any]:
        document = index.get(id)
        if document is None:
            raise HTTPException(404, f"there is no document {id!r}")
        return {
            "id": document.id,
            "text": document.text,
            "metadata": dict(document.metadata),
            "marks": [asdict(m) for m in highlights.highlight_marks(index, question, document.text)],
            "words": highlights.shared_terms(index, question, document.text),
        }

    if not read_only:

        @app.post(
            "/documents",
            dependencies=[Depends(guard.known)],
            summary="Add the documents of a file, which is the request body",
        )
        async def add(request: Request, name: Annotated[str, Query(min_length=1, max_length=200)]) -> dict[str, int]:
            return await writes(uploads.add_upload, index, Path(name).name, await request.body())

        if sync_paths:
            add_sync_endpoint(app, "/sync", index, sync_paths, writes, [Depends(guard.known)], {})

    return app


def _line(event: PassagesFound | AnswerText | AnswerDone, count: "_Counters") -> str:
    match event:
        case PassagesFound(passages, similarity, milliseconds):
            shown = [{k: v for k, v in asdict(p).items() if k != "text"} for p in passages]
            payload = {"passages": shown, "similarity": similarity, "milliseconds": milliseconds}
        case AnswerText(text):
            payload = {"text": text}
        case AnswerDone():
            count.done(event)
            payload = {"done": event.as_dict()}
    return json.dumps(payload, ensure_ascii=False) + "\n"


class _Counters:
    """Metrics for Prometheus."""

    def __init__(self, index: Index) -> None:
        self.registry = CollectorRegistry()
        self.failed = Counter("pilotfish_rag_failures", "Questions that failed", registry=self.registry)
        self._answers = Counter("pilotfish_rag_answers", "Answers", ["known"], registry=self.registry)
        self._running = Gauge("pilotfish_rag_running", "Questions being answered", registry=self.registry)
        buckets = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self._seconds = Histogram(
            "pilotfish_rag_seconds", "Seconds since the question", ["until"], registry=self.registry, buckets=buckets
        )
        documents = Gauge("pilotfish_rag_documents", "Documents in the index", registry=self.registry)
        documents.set_function(lambda: len(index))

    def asking(self) -> Any:
        """Return a context manager that counts a running question."""
        return self._running.track_inprogress()

    def done(self, event: AnswerDone) -> None:
        """Record a complete answer."""
        self._answers.labels(str(event.known).lower()).inc()
        for until, milliseconds in event.milliseconds.items():
            self._seconds.labels(until).observe(milliseconds / 1e3)

    def text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
