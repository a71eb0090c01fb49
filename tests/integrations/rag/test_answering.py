"""An answer as it comes: passages, text, citations, times; what is refused, and what fails."""

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
    try:
        return [event async for event in answerer.answer(question, history, where)]
    finally:
        await answerer.close()


async def test_an_answer_comes_in_parts(documents: Index, language: LanguageServer) -> None:
    found, *parts, done = await events(Answerer(documents, language.url, k=2), "what do pilot fish travel with?")
    assert isinstance(found, PassagesFound) and found.passages[0].id == "sharks"
    assert len(found.passages) == 2
    assert all(isinstance(p, AnswerText) for p in parts) and len(parts) > 3
    assert isinstance(done, AnswerDone)
    assert done.text == "".join(p.text for p in parts).strip() == "Pilot fish travel with sharks [1]."
    assert (done.known, done.cited, list(done.attributed)) == (True, [1], [])
    assert done.tokens == {"prompt": 40, "answer": 9, "cached": 16}
    assert done.saved == {"drafter_accepted_tokens": 3}, "of this answer, not since the server began"
    times = done.milliseconds
    assert 0 < times["retrieval"] <= times["first_token"] <= times["total"]
    sent = language.requests[-1]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == (MODEL, 0.0, 256)
    assert [m["role"] for m in sent["messages"]] == ["system", "user"]


async def test_answers_without_numbers_are_attributed(documents: Index, language: LanguageServer) -> None:
    *_, done = await events(Answerer(documents, language.url), "what is bread, naming nothing?")
    assert (done.known, done.cited, list(done.attributed)) == (True, [], [1])


async def test_what_is_not_known_is_said(documents: Index, language: LanguageServer) -> None:
    *_, done = await events(Answerer(documents, language.url), "unknown moon?")
    assert not done.known
    asked = len(language.requests)
    found, text, done = await events(Answerer(documents, language.url, threshold=0.99), "how do planes fly?")
    assert (list(found.passages), text.text, done.known) == ([], answering.NOTHING, False)
    assert found.similarity < 0.99
    assert len(language.requests) == asked, "the model is not asked where nothing comes near"
    found, *_, done = await events(Answerer(documents, language.url), "sharks", where="year < 1000")
    assert (list(found.passages), done.known) == ([], False)


async def test_filters_and_history_reach_where_they_belong(documents: Index, language: LanguageServer) -> None:
    found, *_ = await events(Answerer(documents, language.url), "sharks", where="kind = 'sky'")
    assert [p.id for p in found.passages] == ["moon"]
    history = prompt.follow_up_question([], found.passages, "sharks", "No.")
    await events(Answerer(documents, language.url), "and the moon?", history)
    assert language.requests[-1]["messages"][1:-1] == history


async def test_failures_are_named(documents: Index, language: LanguageServer) -> None:
    for question, told in (("broken sharks", "the engine has died"), ("refused sharks", "the prompt is too long")):
        with pytest.raises(ServerError, match=told):
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
    ("models", "chat", "told"),
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
async def test_servers_of_other_protocols_are_told(documents: Index, models: Any, chat: str, told: str) -> None:
    app = FastAPI()
    text = models if isinstance(models, str) else json.dumps(models)
    app.get("/v1/models")(lambda: Response(text, media_type="application/json" if text[0] in "{[" else "text/html"))
    app.post("/v1/chat/completions")(lambda: Response(chat, media_type="text/event-stream"))
    app.get("/metrics")(lambda: Response(b"\xff\xfe", media_type="text/plain"))
    with serving(app) as url, pytest.raises(ServerError, match=told):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "ftp://x/v1", "", "http://x:99999/v1"])
async def test_what_is_no_address_is_told(documents: Index, url: str) -> None:
    with pytest.raises(ServerError):
        await events(Answerer(documents, url), "sharks")
    with pytest.raises(ServerError, match=r"^[^(]*is not a valid server address"):
        await connection.named(url, None, "none")


async def test_counters_of_other_servers_are_none(documents: Index, language: LanguageServer) -> None:
    answerer = Answerer(documents, language.url)
    counters = await answerer.counters()
    assert counters is not None and counters.plugins == ("rasd",)
    await answerer.close()
    other = Answerer(documents, "http://127.0.0.1:9/v1")
    assert await other.counters() is None
    await other.close()
    assert httpx.get(language.url + "/models").status_code == 200, "and the server lives on"


def test_answers_are_scored(documents: Index, language: LanguageServer) -> None:
    cases = [
        questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks",)),
        questions.Case("what is bread, naming nothing?", ("Bread is baked from flour and water.",), ("bread",)),
        questions.Case("unknown moon?", ("a month",), ("moon",)),
        questions.Case("unknown planes?", ("wings",), ("planes",)),
        questions.Case("who flies?"),
    ]
    told: list[int] = []
    outcomes = evaluation.ask_questions(Answerer(documents, language.url, k=1), cases, lambda: told.append(1))
    assert len(told) == len(cases)
    assert [o.answerable for o in outcomes] == [True, True, True, False, False]
    found = evaluation.compute_rag_metrics(outcomes)
    third = round(1 / 3, 4)
    assert found["contains"] == round(2 / 3, 4)
    assert found["exact_match"] == third
    assert found["f1"] == round((2 / 6 + 1 + 0) / 3, 4)  # "pilot fish travel with sharks": one word of five
    assert found["honest_refusals"] == 0.5, "the fourth is refused, the fifth is not"
    assert found["wrong_refusals"] == third
    assert found["cites"] == round(2 / 3, 4)
    assert found["citation_precision"] == 0.5, "the first is right; what the fifth names holds no answer"
    assert found["attribution_precision"] == 1.0
    assert found["cached_share"] == 0.4
    assert found["first_token_ms"] <= found["answer_ms_median"] <= found["answer_ms_p95"]
    survey = evaluation.ask_for_passages(documents, cases, 3)
    assert survey["recall@3"] == 1.0
    assert survey["answer_in_passages"] == 1.0
    assert (survey["with_answer"], survey["without_answer"]) == (3, 2)
    assert 0 < survey["threshold"] < 1
    assert "threshold" not in evaluation.ask_for_passages(documents, cases[:3], 3), "one kind alone says nothing"


@pytest.mark.parametrize(("together", "can", "share"), [(False, True, 1.0), (True, False, None)])
def test_documents_are_alternatives_or_all_needed(documents: Index, together: bool, can: bool, share: float) -> None:
    case = questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks", "not there"), together)
    assert evaluation.answerable(documents, case) is can
    assert evaluation.ask_for_passages(documents, [case], 1).get("recall@1") == share
    both = questions.Case("what do pilot fish travel with?", ("sharks",), ("sharks", "bread"), together)
    assert evaluation.ask_for_passages(documents, [both], 1)["recall@1"] == (0.5 if together else 1.0)


def test_the_95th_percentile_is_that() -> None:
    assert evaluation._p95([float(i) for i in range(1, 21)]) == 19.0
    assert evaluation._p95([1.0]) == 1.0
    assert evaluation._p95([]) is None


@pytest.mark.parametrize(
    ("text", "so"),
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
def test_refusals(text: str, so: bool) -> None:
    assert answering.is_abstention(text) is so


def chat_server(
    *contents: Any,
    reason: str | None = "stop",
    end: str = "data: [DONE]\n\n",
    metrics: Callable[[], Any] | None = None,
) -> FastAPI:
    """A server whose answer is made of ``contents`` as they are, and ends for that reason."""
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


async def test_a_refusal_stands_on_nothing(documents: Index) -> None:
    with serving(chat_server("I do not know what pilot fish travel with.")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "pilot fish?")
        assert (done.known, done.cited, list(done.attributed)) == (False, [], [])
    for text, known in (("I do not know more, see [1].", True), ("I do not know [1].", False)):
        with serving(chat_server(text)) as url:
            *_, done = await events(Answerer(documents, f"{url}/v1"), "pilot fish?")
            assert (done.known, done.cited) == (known, [1])


async def test_how_an_answer_ended_is_told(documents: Index) -> None:
    for reason in ("stop", "length"):
        with serving(chat_server("Sharks", " [1]", reason=reason)) as url:
            *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
            assert (done.text, done.ended) == ("Sharks [1]", reason)
    with serving(chat_server("Sha", reason=None)) as url, pytest.raises(ServerError, match="broke off in the middle"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")
    with serving(chat_server("<think>Is it [2]? I do not know.</think>", "\nSharks [1].")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
        assert (done.known, done.cited) == (True, [1]), "what a model thinks aloud is no answer"
    odd = lambda: Response('pilotfish_x{a="b"} abc\npilotfish_y{a="b"} 1\n')  # noqa: E731
    with serving(chat_server("Sharks [1]", metrics=odd)) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
        assert (done.text, done.saved) == ("Sharks [1]", {})


async def test_text_that_nobody_could_write_is_made_writable(documents: Index) -> None:
    with serving(chat_server("half \ud800", " end")) as url:
        *_, done = await events(Answerer(documents, f"{url}/v1"), "sharks")
    assert done.text == "half ? end"


@pytest.mark.parametrize("content", [7, ["a"], {"text": "a"}, True])
async def test_content_that_is_no_text_is_told(documents: Index, content: Any) -> None:
    with serving(chat_server(content)) as url, pytest.raises(ServerError, match="OpenAI's protocol"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


async def test_figures_are_not_waited_for(documents: Index) -> None:
    asked: list[float] = []

    async def hanging() -> None:
        asked.append(time.monotonic())
        await asyncio.sleep(30)

    with serving(chat_server("Sharks [1].", metrics=hanging)) as url:
        answerer = Answerer(documents, f"{url}/v1")
        begun = time.monotonic()
        for _ in range(3):
            *_, done = await events(answerer, "sharks")
            assert (done.text, done.saved) == ("Sharks [1].", {})
        assert time.monotonic() - begun < 4, "a second at most, once"
    assert len(asked) == 1


async def test_a_server_that_breaks_off_is_told(documents: Index) -> None:
    def cut() -> Iterator[str]:
        chunk = {"index": 0, "delta": {"content": "Sha"}, "finish_reason": None}
        told = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [chunk]}
        yield f"data: {json.dumps(told)}\n\n"
        raise SystemError("gone")

    app = chat_server()
    app.router.routes = [r for r in app.router.routes if getattr(r, "path", "") != "/v1/chat/completions"]
    app.post("/v1/chat/completions")(lambda: StreamingResponse(cut(), media_type="text/event-stream"))
    with serving(app) as url, pytest.raises(ServerError, match="broke off"):
        await events(Answerer(documents, f"{url}/v1"), "sharks")


async def test_a_key_that_cannot_be_sent_is_told(documents: Index, language: LanguageServer) -> None:
    with pytest.raises(ServerError, match="key"):
        await events(Answerer(documents, language.url, key="two\nlines"), "sharks")


async def test_the_threshold_beside_the_index_is_used(documents: Index, language: LanguageServer) -> None:
    abstention.write_threshold(documents.folder, 0.99, {})
    try:
        assert Answerer(documents, language.url).threshold == 0.99
        assert Answerer(documents, language.url, threshold=0.1).threshold == 0.1
    finally:
        (documents.folder / abstention.NAME).unlink()


def test_config_errors_are_config_errors() -> None:
    assert issubclass(ServerError, ConfigError), "which commands tell in one line"
