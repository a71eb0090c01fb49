"""Who may talk to our servers, and how much they may send: what stands before every route.

A server that asks for no token listens to this machine alone, but browsers run here too, and any page that they show
can send requests to it. So a request from another page is refused (by ``Origin`` and ``Sec-Fetch-Site``), and one that
came by another name: a page whose own name was made to lead here (DNS rebinding) would count as ours.
"""

import ipaddress
import secrets
import urllib.parse
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

LARGEST_BODY = 16 << 20  # bytes
_BEARER = HTTPBearer(auto_error=False)


class RequestAuth:
    """What one server asks of its clients.

    Args:
        token: What they have to send as a bearer token; None for no question.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token

    def known(self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        """What routes depend on that want the token."""
        token = self._token
        if token is not None and (
            given is None or not secrets.compare_digest(given.credentials.encode(), token.encode())
        ):
            raise HTTPException(401, "send the token as: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def refusal(self, request: Request) -> JSONResponse | None:
        """The answer to a request that no route shall see."""
        if self._token is None and (reason := _foreign(request)):
            return JSONResponse({"detail": f"{reason}; start the server with a token to allow this"}, 403)
        length = request.headers.get("content-length", "0")
        told = length.isdecimal() and len(length) < 20 and "transfer-encoding" not in request.headers
        if request.method in ("POST", "PUT", "PATCH") and not (told and int(length) <= LARGEST_BODY):
            return JSONResponse({"detail": f"a body has a content-length of at most {LARGEST_BODY} bytes"}, 413)
        return None


def _foreign(request: Request) -> str | None:
    """Why a request without a token is not from here; None where it is."""
    host, origin = request.headers.get("host", "localhost"), request.headers.get("origin")
    if not _ours(host):
        return f"Host: {host[:100]!r} is no name of this server"
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        return f"Origin: {origin[:100]!r} is another page"
    from_elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    followed = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    if from_elsewhere and not (followed and request.headers.get("sec-fetch-dest", "document") == "document"):
        # Links to our pages may be followed, frames would show them under another's mouse.
        return "Sec-Fetch-Site: another page asks"
    return None


def _ours(host: str) -> bool:
    """Whether a Host header names this machine, or an address, to which no name can be made to lead."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name != "localhost" and not name.endswith(".localhost"):
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
