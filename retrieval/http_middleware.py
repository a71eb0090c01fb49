"""ASGI middleware of our HTTP servers: HEAD requests, and a limit of the size of request bodies."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

LARGEST_BODY = 16 << 20  # bytes
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class HeadRequests:
    """Answers HEAD like GET, without a body; FastAPI's routes refuse HEAD."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_without_body)


class BodyLimit:
    """Refuses bodies of more than `LARGEST_BODY` bytes, also those sent in chunks without a length."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        length, messages = headers.get(b"content-length"), list[Message]()
        if b"transfer-encoding" in headers:  # read now, so that a body that is too large can be refused
            size, more = 0, True
            while more and size <= LARGEST_BODY:
                messages.append(await receive())
                size += len(messages[-1].get("body", b""))
                more = messages[-1].get("more_body", False)
        elif length is not None:
            size = int(length) if length.isdecimal() and len(length) < 20 else LARGEST_BODY + 1
        else:
            size = 0
        if size > LARGEST_BODY:
            refusal = JSONResponse({"detail": f"the body is larger than {LARGEST_BODY} bytes"}, 413)
            await refusal(scope, receive, send)
            return
        waiting = iter(messages)

        async def receive_again() -> Message:
            return next(waiting, None) or await receive()

        await self.app(scope, receive_again if messages else receive, send)
