"""Streamed answers: passages, text, citations, timings, abstention, and errors of language model servers."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from language_server import MODEL, LanguageServer, serving

from pilotfish.integrations.rag import abstention, answering, connection, evaluation, prompt, questions
from pilotfish.integrations.rag.answering import AnswerDone, Answerer, AnswerText, PassagesFound
from pilotfish.integrations.rag.connection import ServerError
from pilotfish.plugins.config import ConfigError
from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import RetrievalError

Ask = Callable[..., Any]


async def events(
    answerer: Answerer, question: str, history: Sequence[prompt.Message] = (), where: str | None = None
) -> list[Any]:
    """Return all events of an answer, and close the answerer."""
    try:
        return [event async for event in answerer.answer(question, history, where)]
    finally:
        await answerer.close()


async def test_answer_is_streamed_as_events(documents: Index, language: LanguageServer) -> None:
    first, *parts, done = await events(Answerer(documents, language.url, k=2), "what do pilot fish travel with?")
    assert isinstance(first, PassagesFound) and first.passages[0].id == "sharks"
    assert len(first.passages) == 2
    assert all(isinstance(p, AnswerText) for p in parts) and len(parts) > 3
    assert isinstance(done, AnswerDone)
    assert done.text == "".join(p.text for p in parts).strip() == "Pilot fish travel with sharks [1]."
    assert (done.known, done.cited, list(done.attributed)) == (True, [1], [])
    assert done.tokens == {"prompt": 40, "answer": 9, "cached": 16}
    assert done.saved == {"drafter_accepted_tokens": 3}, "counted for this answer, not since the server started"
    times = done.milliseconds
    assert 0 < times["retrieval"] <= times["first_token"] <= times["total"]
    request = language.requests[-1]
    assert (request["model"], request["temperature"], request["max_tokens"]) == (MODEL, 0.0, 256)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]


async def test_answers_without_citations_are_attributed(documents: Index, language: LanguageServer) -> None:
    *_, done = await events(Answerer(documents, language.url), "what is bread, naming nothing?")
    assert (done.known, done.cited, list(done.attributed)) == (True, [], [1])


async def test_abstains_without_similar_passages(documents: Index, language: LanguageServer) -> None:
    *_, done = await events(Answerer(documents, language.url), "unknown moon?")
    assert not done.known
    num_requests = len(language.requests)
    first, text, done = await events(Answerer(documents, language.url, threshold=0.99), "how do planes fly?")
    assert (list(first.passages), text.text, done.known) == ([], answering.NOTHING, False)
    assert first.similarity < 0.99
    assert len(language.requests) == num_requests, "the model is not called when no passage is similar enough"
    first, *_, done = await events(Answerer(documents, language.url), "sharks", where="year < 1000")
    assert (list(first.passages), done.known) == ([], False)


async def test_filter_applies_to_retrieval_and_history_to_the_prompt(
    documents: Index, language: LanguageServer
) -> None:
    first, *_ = await events(Answerer(documents, language.url), "sharks", where="kind = 'sky'")
    assert [p.id for p in first.passages] == ["moon"]
    history = prompt.follow_up_question([], first.passages, "sharks", "No.")
    await events(Answerer(documents, language.url), "and the moon?", history)
    assert language.requests[-1]["messages"][1:-1] == history


async def test_errors_of_server_and_filter_are_reported(documents: Index, language: LanguageServer) -> None:
    for question, message in (("broken sharks", "the engine has died"), ("refused sharks", "the prompt is too long")):
        with pytest.raises(ServerError, match=message):
            await events(Answerer(documents, language.url), question)
    with pytest.raises(ServerError, match="no server answers there"):
        await events(Answerer(documents, "http://127.0.0.1:9/v1"), "sharks")
    with pytest.raises(RetrievalError, match="expected a value"):
        await events(Answerer(documents, language.url), "sharks", where="year <")
    assert await connection.named(language.url, None, "none") == MODEL
    with pytest.raises(ServerError, match=f"no model other; it has {MODEL}"):
        await connection.named(language.url, "other", "none")


MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "test"}]}


@pytest.mark.parametrize(
    ("models", "chat", "message"),
    [
        ("<html>", "", "does not follow OpenAI's protocol"),
        ("{", "", "does not follow OpenAI's protocol"),
        ("[1]", "", "does not follow OpenAI's protocol"),
        ("{}", "", "no model at all"),
        (MODELS, "data: {not json}\n\n", "does not follow OpenAI's protocol"),
        (MODELS, "data: [1, 2]\n\n", "does not follow OpenAI's protocol"),
        (MODELS, "<html>", "contains no field"),
        (MODELS, "", "contains no field"),
    ],
)
async def test_refuses_servers_that_do_not_follow_the_protocol(
    documents: Index, models: Any, chat: str, message: str
) -> None:
    app = FastAPI()
    text = models if isinstance(models, str) else json.dumps(models)
    app.get("/v1/models")(lambda: Response(text, media_type="application/json" if text[0] in "{[" else "text/html"))
    app.post("/v1/chat/completions")(lambda: Response(chat, media_type="text/event-stream"))
    app.get("/metrics")(lambda: Response(b"\xff\xfe", media_type="text/plain"))
    with serving(app) as url, pytest.raises(ServerError, match=message):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "ftp://x/v1", "", "http://x:99999/v1"])
async def test_refuses_invalid_server_address(documents: Index, url: str) -> None:
    with pytest.raises(ServerError):
        await events(Answerer(documents, url), "sharks")
    with pytest.raises(ServerError, match=r"^[^(]*is not a valid server address"):
        await connection.named(url, None, "none")


async def test_counters_are_none_without_metrics(documents: Index, language: LanguageServer) -> None:
    answerer = Answerer(documents, language.url)
    counters = await answerer.counters()
    assert counters is not None and counters.plugins == ("rasd",)
    await answerer.close()
    other = Answerer(documents, "http://127.0.0.1:9/v1")
    assert await other.counters() is None
    await other.close()
    assert httpx.get(language.url + "/models").status_code == 200, "the server still answers"


def test_evaluation_metrics(documents: Index, language: LanguageServer) -> None:
    cases = [
        questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks",)),
        questions.Case("what is bread, naming nothing?", ("Bread is baked from flour and water.",), ("bread",)),
        questions.Case("unknown moon?", ("a month",), ("moon",)),
        questions.Case("unknown planes?", ("wings",), ("planes",)),
        questions.Case("who flies?"),
    ]
    progress: list[int] = []
    outcomes = evaluation.ask_questions(Answerer(documents, language.url, k=1), cases, lambda: progress.append(1))
    assert len(progress) == len(cases)
    assert [o.answerable for o in outcomes] == [True, True, True, False, False]
    metrics = evaluation.compute_rag_metrics(outcomes)
    third = round(1 / 3, 4)
    assert metrics["contains"] == round(2 / 3, 4)
    assert metrics["exact_match"] == third
    assert metrics["f1"] == round((2 / 6 + 1 + 0) / 3, 4)  # "pilot fish travel with sharks": one word of five
    assert metrics["true_abstentions"] == 0.5, "the fourth is abstained from, the fifth is not"
    assert metrics["false_abstentions"] == third
    assert metrics["cites"] == round(2 / 3, 4)
    assert metrics["citation_precision"] == 0.5, "the first is right; the passage cited by the fifth contains no answer"
    assert metrics["attribution_precision"] == 1.0
    assert metrics["cached_share"] == 0.4
    assert metrics["first_token_ms"] <= metrics["answer_ms_median"] <= metrics["answer_ms_p95"]
    survey = evaluation.ask_for_passages(documents, cases, 3)
    assert survey["recall@3"] == 1.0
    assert survey["answer_in_passages"] == 1.0
    assert (survey["with_answer"], survey["without_answer"]) == (3, 2)
    assert 0 < survey["threshold"] < 1
    assert "threshold" not in evaluation.ask_for_passages(documents, cases[:3], 3), (
        "a threshold needs both answerable and unanswerable questions"
    )


@pytest.mark.parametrize(("together", "can", "share"), [(False, True, 1.0), (True, False, None)])
def test_recall_with_alternative_and_with_required_documents(
    documents: Index, together: bool, can: bool, share: float
) -> None:
    case = questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks", "not there"), together)
    assert evaluation.answerable(documents, case) is can
    assert evaluation.ask_for_passages(documents, [case], 1).get("recall@1") == share
    both = questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks", "bread"), together)
    assert evaluation.ask_for_passages(documents, [both], 1)["recall@1"] == (0.5 if together else 1.0)


def test_95th_percentile() -> None:
    assert evaluation._p95([float(i) for i in range(1, 21)]) == 19.0
    assert evaluation._p95([1.0]) == 1.0
    assert evaluation._p95([]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I do not know.", True),
        ("I don’t know", True),
        ("**I don't know.**", True),
        ('"I do not know."', True),
        ("Sorry, I do not know.", True),
        ("Answer: I do not know.", True),
        ("I'm afraid I do not know.", True),
        ("I'm sorry, but I do not know the answer.", True),
        ("I do not know who he is. The passages do not say.", True),
        ("", True),
        ("  \n", True),
        ("I do not know why, but sharks do.", False),
        ("I do not knowingly swim.", False),
        ("I do not know. But sharks do.", False),
        ("I do not know. The passages name sharks, but no other fish.", True),
        ("Sharks. I do not know more.", False),
        ("Nobody knows.", False),
    ],
)
def test_is_abstention(text: str, expected: bool) -> None:
    assert answering.is_abstention(text) is expected


def chat_server(
    *contents: Any,
    reason: str | None = "stop",
    end: str = "data: [DONE]\n\n",
    metrics: Callable[[], Any] | None = None,
) -> FastAPI:
    """Return a server that streams ``contents`` unchanged and ends with the finish reason ``reason``."""
    app = FastAPI()
    app.get("/v1/models")(lambda: MODELS)
    base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    reasons = [*[None] * (len(contents) - 1), reason]
    choices = [
        {"index": 0, "delta": {"content": c}, "finish_reason": r} for c, r in zip(contents, reasons, strict=False)
    ]
    chunks = [{**base, "choices": [c]} for c in choices]
    body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + end
    app.post("/v1/chat/completions")(lambda: Response(body, media_type="text/event-stream"))
    app.get("/metrics")(metrics or (lambda: Response("", 404)))
    return app


async def test_abstention_cites_no_passages(documents: Index) -> None:
    with serving(chat_server("I do not know what pilot fish travel with.")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "pilot fish?")
        assert (done.known, done.cited, list(done.attributed)) == (False, [], [])
    for text, known in (("I do not know more, see [1].", True), ("I do not know [1].", False)):
        with serving(chat_server(text)) as url:
            *_, done = await events(Answerer(documents, f"{url}/v1"), "pilot fish?")
            assert (done.known, done.cited) == (known, [1])


async def test_finish_reason_is_reported(documents: Index) -> None:
    for reason in ("stop", "length"):
        with serving(chat_server("Sharks", " [1]", reason=reason)) as url:
            *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
            assert (done.text, done.ended) == ("Sharks [1]", reason)
    with serving(chat_server("Sha", reason=None)) as url, pytest.raises(ServerError, match="broke off in the middle"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")
    with serving(chat_server("<think>Is it [2]? I do not know.</think>", "\nSharks [1].")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
        assert (done.known, done.cited) == (True, [1]), "the reasoning of a model is not part of the answer"
    odd = lambda: Response('pilotfish_x{a="b"} abc\npilotfish_y{a="b"} 1\n')  # noqa: E731
    with serving(chat_server("Sharks [1]", metrics=odd)) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
        assert (done.text, done.saved) == ("Sharks [1]", {})


async def test_lone_surrogates_are_replaced(documents: Index) -> None:
    with serving(chat_server("half \ud800", " end")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
    assert done.text == "half ? end"


@pytest.mark.parametrize("content", [7, ["a"], {"text": "a"}, True])
async def test_refuses_content_that_is_not_text(documents: Index, content: Any) -> None:
    with serving(chat_server(content)) as url, pytest.raises(ServerError, match="OpenAI's protocol"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


async def test_answers_do_not_wait_for_metrics(documents: Index) -> None:
    calls: list[float] = []

    async def hanging() -> None:
        calls.append(time.monotonic())
        await asyncio.sleep(30)

    with serving(chat_server("Sharks [1].", metrics=hanging)) as url:
        answerer = Answerer(documents, f"{url}/v1")
        start = time.monotonic()
        for _ in range(3):
            *_, done = await events(answerer, "sharks")
            assert (done.text, done.saved) == ("Sharks [1].", {})
        assert time.monotonic() - start < 25, "it waits a second at most, and only once"
    assert len(calls) == 1


async def test_reports_a_broken_stream(documents: Index) -> None:
    def cut() -> Iterator[str]:
        chunk = {"index": 0, "delta": {"content": "Sha"}, "finish_reason": None}
        event = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [chunk]}
        yield f"data: {json.dumps(event)}\n\n"
        raise SystemError("gone")

    app = chat_server()
    app.router.routes = [r for r in app.router.routes if getattr(r, "path", "") != "/v1/chat/completions"]
    app.post("/v1/chat/completions")(lambda: StreamingResponse(cut(), media_type="text/event-stream"))
    with serving(app) as url, pytest.raises(ServerError, match="broke off"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


async def test_refuses_key_that_cannot_be_a_header(documents: Index, language: LanguageServer) -> None:
    with pytest.raises(ServerError, match="key"):
        await events(Answerer(documents, language.url, key="two\nlines"), "sharks")


async def test_saved_threshold_of_the_index_is_used(documents: Index, language: LanguageServer) -> None:
    abstention.write_threshold(documents.folder, 0.99, {})
    try:
        assert Answerer(documents, language.url).threshold == 0.99
        assert Answerer(documents, language.url, threshold=0.1).threshold == 0.1
    finally:
        (documents.folder / abstention.NAME).unlink()


def test_server_error_is_a_config_error() -> None:
    assert issubclass(ServerError, ConfigError), "commands print it as one line"
