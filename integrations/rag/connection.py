"""Connections to the server of a language model, the names of its models, and one-line error messages."""

import contextlib
import urllib.parse
from collections.abc import Iterator

import httpx
import openai

from ...plugins.config import ConfigError

PATIENCE = 30  # timeout of the request for the list of models, in seconds


class ServerError(ConfigError):
    """Error for a server that cannot be reached, or does not answer as expected."""


class Clients:
    """Connections to a server: a client of OpenAI's library, and a plain HTTP client for other requests."""

    def __init__(self, url: str, key: str) -> None:
        self.openai = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=1)
        self.plain = httpx.AsyncClient()

    async def close(self) -> None:
        await self.openai.close()
        await self.plain.aclose()


async def named(url: str, model: str | None, key: str) -> str:
    """Return the name of a model at a server; the server's first model if ``model`` is None.

    Raises:
        ServerError: The server cannot be reached, or has no such model.
    """
    with translate_errors(url):
        async with openai.AsyncOpenAI(
            base_url=parse_address(url), api_key=key, max_retries=1, timeout=PATIENCE
        ) as client:
            names = [m.id async for m in client.models.list()]
    if not names or model not in (None, *names):
        raise ServerError(f"{url}: has no model {model or 'at all'}; it has {', '.join(names) or 'none'}")
    return model or names[0]


def parse_address(url: str) -> str:
    """Check the URL of a server, and return it unchanged.

    Raises:
        ServerError: The URL is invalid.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:
        pass
    raise ServerError(f"{url or 'the empty text'}: is not a valid server address; expected http://HOST:PORT/v1")


@contextlib.contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Turn exceptions of requests to a server into a `ServerError` with a one-line message.

    Raises:
        ServerError: A request failed.
    """
    try:
        yield
    except ServerError:
        raise
    except openai.APIError as error:
        raise ServerError(f"{url}: {_reason(error)}") from None
    except (ValueError, AttributeError, TypeError, KeyError) as error:  # OpenAI's library does not validate answers
        raise ServerError(f"{url}: the answer does not follow OpenAI's protocol ({_line(error)[:100]})") from None
    except Exception as error:
        if not _is(error, "TransportError"):  # OpenAI's library does not catch it in a stream
            raise
        raise ServerError(f"{url}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the reason of an error in one line."""
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
    if _is(cause, "ConnectError", "ConnectTimeout"):
        return "no server answers there; start one with `pilotfish serve MODEL`, or give --start MODEL"
    if _is(cause, "TimeoutException"):
        return "the server did not answer in time"
    if _is(cause, "LocalProtocolError"):
        return f"the request cannot be sent: {_line(cause)}; check the key"
    if _is(cause, "TransportError"):
        return f"the server broke off the connection: {_line(cause)}"
    body = getattr(error, "body", None)
    return _line((isinstance(body, dict) and body.get("message")) or error)


def _is(error: BaseException | None, *names: str) -> bool:
    """Return whether an error's class has one of the names in httpx, or in its successor in newer OpenAI libraries."""
    return any(c.__name__ in names and c.__module__.startswith("httpx") for c in type(error).__mro__)


def _line(message: object) -> str:
    return " ".join(str(message).split())[:500]
