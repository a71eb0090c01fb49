"""A test server with OpenAI's API that answers by a fixed rule from the first passage of its prompt."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

MODEL = "by-rule"
DOCUMENTS = (
    ("sharks", "Pilot fish travel with sharks. They eat what sharks leave over.", {"year": 2020, "kind": "sea"}),
    ("bread", "Bread is baked from flour and water. An oven is hot.", {"year": 1999, "kind": "kitchen"}),
    ("moon", "The moon goes around the earth in a month. It has no air.", {"year": 2021, "kind": "sky"}),
)
_PASSAGE = re.compile(r"^Passage \[(\d+)\]\n((?:> .*\n)+)", re.MULTILINE)


class LanguageServer:
    """Server that repeats the first sentence of the first passage and cites it.

    Words in the question change the answer: ``unknown`` gives an abstention, ``naming nothing`` an answer without a
    citation, ``broken`` an error in the middle of the stream, ``slow`` a delay per word, ``refused`` status 400.

    Attributes:
        requests: Bodies of the chat requests that the server received.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/metrics", response_class=PlainTextResponse)(self.metrics)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "test"}]}

    def metrics(self) -> str:
        accepted = 3 * len(self.requests)
        return f'pilotfish_drafter_accepted_tokens_total{{engine="0",plugin="rasd"}} {accepted}.0\n'

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        self.requests.append(body)
        prompt = body["messages"][-1]["content"]
        question = prompt.rpartition("Question: ")[2]
        if "refused" in question:
            return JSONResponse({"error": {"message": "the prompt is too long", "code": 400}}, 400)
        return StreamingResponse(self.events(question, self.answer(prompt, question)), media_type="text/event-stream")

    def answer(self, asked: str, question: str) -> str:
        if "unknown" in question:
            return "I don't know."
        number, lines = _PASSAGE.findall(asked)[0]
        sentence = lines.removeprefix("> ").partition(".")[0].strip()
        return f"{sentence}." if "naming nothing" in question else f"{sentence} [{number}]."

    def events(self, question: str, answer: str) -> Iterator[str]:
        def event(**more: Any) -> str:
            data = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [], **more}
            return f"data: {json.dumps(data)}\n\n"

        for number, word in enumerate(re.findall(r"\S+\s*", answer)):
            if "broken" in question and number == 2:
                yield f"data: {json.dumps({'error': {'message': 'the engine has died', 'code': 500}})}\n\n"
                return
            if "slow" in question:
                time.sleep(0.2)
            yield event(choices=[{"index": 0, "delta": {"content": word}, "finish_reason": None}])
        usage = {"prompt_tokens": 40, "completion_tokens": 9, "total_tokens": 49}
        yield event(usage={**usage, "prompt_tokens_details": {"cached_tokens": 16}})
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of this machine, and yield its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextlib.contextmanager
def running() -> Iterator[LanguageServer]:
    """Start a language server, yield it, and stop it at the end."""
    server = LanguageServer()
    with serving(server.app) as url:
        server.url = f"{url}/v1"
        yield server
