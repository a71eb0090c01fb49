"""The server of a language model: its address, its models, connections, and what goes wrong with it, in one line."""

import contextlib
import urllib.parse
from collections.abc import Iterator

import httpx
import openai

from ...plugins.config import ConfigError

PATIENCE = 30  # seconds for a server to name its models


class ServerError(ConfigError):
    """The server cannot be reached, or does not answer."""


class Clients:
    """Connections to a server: by OpenAI's library, and for what that does not know."""

    def __init__(self, url: str, key: str) -> None:
        self.openai = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=1)
        self.plain = httpx.AsyncClient()

    async def close(self) -> None:
        await self.openai.close()
        await self.plain.aclose()


async def named(url: str, model: str | None, key: str) -> str:
    """The model's name at a server: the first that it has, where none is given.

    Raises:
        ServerError: there is no server, or it has no such model.
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
    """A server's URL, if it is one.

    Raises:
        ServerError: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:
        pass
    raise ServerError(f"{url or 'the empty text'}: is no server's address; expected http://HOST:PORT/v1")


@contextlib.contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """What goes wrong between us and a server becomes one line.

    Raises:
        ServerError: it did.
    """
    try:
        yield
    except ServerError:
        raise
    except openai.APIError as error:
        raise ServerError(f"{url}: {_reason(error)}") from None
    except (ValueError, AttributeError, TypeError, KeyError) as error:  # OpenAI's library trusts what it is sent
        raise ServerError(f"{url}: does not answer as OpenAI's protocol has it ({_line(error)[:100]})") from None
    except Exception as error:
        if not _is(error, "TransportError"):  # which OpenAI's library lets through once an answer has begun
            raise
        raise ServerError(f"{url}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """In one line."""
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
    if _is(cause, "ConnectError", "ConnectTimeout"):
        return "no server answers there; start one with `pilotfish serve MODEL`, or give --start MODEL"
    if _is(cause, "TimeoutException"):
        return "the server takes too long"
    if _is(cause, "LocalProtocolError"):
        return f"cannot be asked so: {_line(cause)}; look at the key"
    if _is(cause, "TransportError"):
        return f"the server broke off: {_line(cause)}"
    body = getattr(error, "body", None)
    return _line((isinstance(body, dict) and body.get("message")) or error)


def _is(error: BaseException | None, *names: str) -> bool:
    """Whether an error is of a class of httpx, by name: OpenAI's library has changed from httpx to its successor."""
    return any(c.__name__ in names and c.__module__.startswith("httpx") for c in type(error).__mro__)


def _line(told: object) -> str:
    return " ".join(str(told).split())[:500]
