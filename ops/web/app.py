"""The server of the page of runs, on this machine's loopback alone.

Every path but the page itself wants the token. Another website may not drive it through a browser
(Origin), nor through a host name that points here (Host); the page's policy lets run the page's own
script and style, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from ops.errors import MilkteaError, PreflightError
from ops.plain import plain
from ops.run.view import Run
from ops.web.facts import Runs
from trainer.wire.browser import HEADERS, bears, content_policy, is_foreign

PAGE = Path(__file__).with_name("page.html")
PORT = 8015
LOOPBACK = ("127.0.0.1", "localhost")
BODY_BYTES = 4096
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
End = Callable[[Run, str], str]  # gives a run an end; returns what holds now, in words
log = logging.getLogger(__name__)


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def application(root: Path, token: str, end: End) -> web.Application:
    """The page of the runs in `root`. `end` is called in a thread, for a wish that was offered."""
    desk = _Desk(root, token, end)
    app = web.Application(middlewares=[desk.guard], client_max_size=BODY_BYTES)
    app.on_response_prepare.append(_add_headers)
    app.add_routes(
        [
            web.get("/", desk.page),
            web.get("/runs", desk.listed),
            web.get("/runs/{id}", desk.one),
            web.post("/runs/{id}/end", desk.end),
            web.get("/costs", desk.costs),
        ]
    )
    return app


class _Desk:
    def __init__(self, root: Path, token: str, end: End) -> None:
        self._runs, self._token, self._end = Runs(root), token.encode(), end
        self._reading = asyncio.Lock()
        self._page = PAGE.read_bytes()
        self._policy = content_policy(self._page.decode())

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._validate(request)
            return await handler(request)
        except _Refused as refused:
            return _refusal(refused.status, str(refused))
        except MilkteaError as e:
            more = {"money": plain(e.money), "hint": plain(e.hint)}
            return _refusal(409, plain(str(e)), **more)
        except web.HTTPException as e:
            return _refusal(e.status, e.reason)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            log.exception("%s failed", request.path)
            return _refusal(500, "this server failed; its terminal says why")

    def _validate(self, request: web.Request) -> None:
        """Raises _Refused."""
        host = request.headers.get("Host", "").lower()
        if host.rpartition(":")[0] not in LOOPBACK:
            raise _Refused(403, "this server does not go by that name")
        if is_foreign(request.headers.get("Origin"), host):
            raise _Refused(403, "another website may not ask here")
        if request.path == "/" and request.method in ("GET", "HEAD"):
            return
        if not bears(request.headers.get("Authorization", ""), self._token):
            raise _Refused(401, "no token, or a wrong one")

    async def page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._policy}
        return web.Response(
            body=self._page, content_type="text/html", charset="utf-8", headers=headers
        )

    async def listed(self, request: web.Request) -> web.Response:
        return _json(await self._read(self._runs.listed))

    async def one(self, request: web.Request) -> web.Response:
        return _json(await self._read(lambda: self._runs.one(request.match_info["id"])))

    async def costs(self, request: web.Request) -> web.Response:
        return _json(await self._read(self._runs.costs))

    async def end(self, request: web.Request) -> web.Response:
        """Give a run the end in the body, {"wish": ...}, where it is offered at this moment."""
        if request.content_type != "application/json":
            raise _Refused(415, "send application/json")
        try:
            wish = str(json.loads(await request.read())["wish"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Refused(400, "the body names no wish") from None
        run = await self._read(lambda: self._runs.find(request.match_info["id"]))
        offered = [choice.wish for choice in run.choices()] if run.owner else []
        if wish not in offered or wish == "leave":
            raise _Refused(409, f"{run.id} does not offer that now")
        return _json({"holds": plain(await asyncio.to_thread(self._end, run, wish))})

    async def _read(self, act: Callable[[], T]) -> T:
        async with self._reading:
            return await asyncio.to_thread(act)


def _refusal(status: int, why: str, **more: str) -> web.Response:
    return web.json_response({"error": why, **more}, status=status)


def _json(value: Any) -> web.Response:
    return web.json_response(value, dumps=lambda v: json.dumps(v, ensure_ascii=False))


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal on_response_prepare."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)


async def listening(app: web.Application, port: int | None) -> tuple[web.AppRunner, int]:
    """The application at `port` of loopback, or at PORT, or a free one where that is taken. Raises
    PreflightError where `port` is taken."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    for one in [PORT, 0] if port is None else [port]:
        try:
            await web.TCPSite(runner, "127.0.0.1", one).start()
            return runner, int(runner.addresses[0][1])
        except OSError:
            continue
    await runner.cleanup()
    raise PreflightError(f"port {port} is taken on this machine", hint="--port with another one")


def serve(root: Path, end: End, told: Callable[[str], None], port: int | None = None) -> None:
    """Serve the runs in `root` until SIGINT; `told` hears the page's address, which holds the
    token. Raises PreflightError."""

    async def run() -> None:
        token = secrets.token_urlsafe(32)
        runner, taken = await listening(application(root, token, end), port)
        try:
            told(f"http://127.0.0.1:{taken}/#{token}")
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        pass
