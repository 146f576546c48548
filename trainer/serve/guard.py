"""Checks who may ask: a token on every path but the page and the health. No other website may drive
this server through a browser (Origin), nor through a host name that points here (Host).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web

from trainer.serve.requests import RequestError
from trainer.wire.browser import HEADERS, bears, is_foreign

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/", "/health")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def new_token() -> str:
    return secrets.token_urlsafe(32)


class Guard:
    """A middleware: checks each request, and tells every refusal in OpenAI's shape."""

    def __init__(self, token: str, hosts: Collection[str] = ()) -> None:
        self._token = token.encode()
        self._hosts = {*LOOPBACK, *(host.lower() for host in hosts)}

    def validate(self, request: web.Request) -> None:
        """Raises RequestError."""
        host = request.headers.get("Host", "")
        if _name(host) not in self._hosts:
            raise RequestError("this server does not go by that name", "Host", "host", 403)
        if is_foreign(request.headers.get("Origin"), host):
            raise RequestError("another website may not ask here", "Origin", "origin", 403)
        if request.path in OPEN and request.method in ("GET", "HEAD"):
            return
        if not bears(request.headers.get("Authorization", ""), self._token):
            raise RequestError(
                "no token, or a wrong one: Authorization: Bearer TOKEN, as `milktea serve` "
                "printed it",
                None,
                "invalid_api_key",
                401,
            )

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self.validate(request)
            return await handler(request)
        except RequestError as error:
            return refusal(error)
        except web.HTTPException as error:
            code = error.reason.lower().replace(" ", "_")
            return refusal(RequestError(error.reason, None, code, error.status))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return refusal(
                RequestError(
                    "this server failed; its log says why", None, None, 500, "server_error"
                )
            )


def refusal(error: RequestError) -> web.Response:
    response = web.json_response(error.body, status=error.status)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response


def _name(host: str) -> str:
    """The host without its port, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal on_response_prepare."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)
