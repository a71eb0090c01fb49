"""Checks of the requests to our HTTP servers: bearer token, and Host and Origin headers.

A server without a token listens on the loopback interface only. But a browser on the same machine can send requests to
it from any web page. Requests from other pages are therefore refused (by ``Origin`` and ``Sec-Fetch-Site``), and so are
requests under another host name: a page could make its own name resolve to this machine (DNS rebinding).
"""

import ipaddress
import secrets
import urllib.parse
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

_BEARER = HTTPBearer(auto_error=False)


class RequestAuth:
    """Request checks of one server.

    Args:
        token: Bearer token that clients have to send; None if no token is required.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token

    def known(self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        """Check the token; routes that require it depend on this method."""
        token = self._token
        if token is not None and (
            given is None or not secrets.compare_digest(given.credentials.encode(), token.encode())
        ):
            raise HTTPException(401, "send the token as: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def refusal(self, request: Request) -> JSONResponse | None:
        """Return the response to a request that is refused before routing, or None if it is accepted."""
        if self._token is None and (reason := _foreign(request)):
            return JSONResponse({"detail": f"{reason}; start the server with a token to allow this"}, 403)
        return None


def _foreign(request: Request) -> str | None:
    """Return why a request without a token is refused as foreign, or None if it is accepted."""
    host, origin = request.headers.get("host", "localhost"), request.headers.get("origin")
    if not _ours(host):
        return f"Host: {host[:100]!r} is not a name of this server"
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        return f"Origin: {origin[:100]!r} is another page"
    from_elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    followed = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    if from_elsewhere and not (followed and request.headers.get("sec-fetch-dest", "document") == "document"):
        # Links to our pages may be followed; frames may not show them (clickjacking).
        return "Sec-Fetch-Site: another page asks"
    return None


def _ours(host: str) -> bool:
    """Return whether a Host header is localhost, or an IP address, which DNS rebinding cannot fake."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name != "localhost" and not name.endswith(".localhost"):
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
