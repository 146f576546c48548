"""The HTTP side: one aiohttp application that turns requests into Calls, spoils them as the faults say, and logs them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ops.fakevast.cloud.errors import Refusal, no_key
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.http import account as api_account
from ops.fakevast.http import instances as api_instances
from ops.fakevast.http.rate_limits import TooSoon
from ops.fakevast.http.routes import Route, find_route

if TYPE_CHECKING:
    from ops.fakevast.cloud.cloud import Cloud
    from ops.fakevast.server import Emulator

_LONGEST_LOG = 200_000
_CUT_BEFORE = {"lost_request"}
_BUSY = "API requests too frequent endpoint threshold={}"


@dataclass
class Call:
    """One API request on its way to its handler. `key` is None when nobody is logged in."""

    emulator: Emulator
    route: Route
    path: dict[str, int]
    request_query: dict[str, str]
    json: dict[str, Any]
    key: str | None
    fault: Fault | None = None

    @property
    def cloud(self) -> Cloud:
        return self.emulator.cloud

    def query(self, name: str, default: Any) -> Any:
        """A JSON value of the query string; raises Refusal 400 when it is not JSON."""
        text = self.request_query.get(name)
        if text in (None, ""):
            return default
        try:
            return json.loads(str(text))
        except ValueError as error:
            raise Refusal(400, "invalid_request", f"Error in query parameters: {name} is not valid JSON") from error


@dataclass
class Reply:
    """What goes back; `cut` sends nothing and breaks the connection."""

    status: int
    body: Any
    content_type: str = "application/json"
    delay_s: float = 0.0
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def application(emulator: Emulator) -> web.Application:
    app = web.Application(client_max_size=64 * 1024 * 1024)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await _serve(emulator, request)

    app.router.add_route("*", "/{path:.*}", handle)
    return app


async def _serve(emulator: Emulator, request: web.Request) -> web.StreamResponse:
    emulator.touch()
    if request.path.startswith("/_fake/"):
        return await _control(emulator, request)
    if request.path.startswith("/_results/"):
        return _result(emulator, request.path.rsplit("/", 1)[1])
    raw = await request.read()
    entry: dict[str, Any] = {"t": emulator.cloud.clock.now(), "method": request.method, "path": request.path_qs}
    entry |= {"route": None, "status": None, "fault": None}
    emulator.requests.append(entry)
    if len(emulator.requests) > _LONGEST_LOG:
        del emulator.requests[: _LONGEST_LOG // 2]
    try:
        reply = _answer(emulator, request, raw, entry)
    except Refusal as refusal:
        reply = Reply(refusal.status, refusal.body)
    except TooSoon as early:
        reply = _too_soon(entry["route"], early.threshold_s)
    finally:
        emulator.wake()
    entry["status"] = None if reply.cut else reply.status
    if reply.delay_s:
        await asyncio.sleep(reply.delay_s)
    if reply.cut and request.transport is not None:
        request.transport.abort()
    body = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
    return web.Response(status=reply.status, body=body.encode(), content_type=reply.content_type, headers=reply.headers)


def _answer(emulator: Emulator, request: web.Request, raw: bytes, entry: dict[str, Any]) -> Reply:
    """The whole life of a call but the sending. Nothing here awaits: calls are served one at a time, as by one database."""
    found = find_route(request.method, request.path)
    if found is None:
        message = f"fakevast does not emulate {request.method} {request.path}"
        return Reply(501, {"success": False, "error": "not_emulated", "msg": message})
    route, path = found
    entry["route"] = route.name
    key = _key_of(request)
    call = Call(emulator, route, path, dict(request.query), {}, key)
    _authorize(call)
    caller = f"{key}{request.remote}"
    emulator.rate_limits.check(route.name, caller, emulator.cloud.clock.now())
    call.json = _body(raw)
    call.fault = emulator.cloud.faults.take(route.name, **_context(call))
    entry["fault"] = call.fault.what if call.fault else None
    spoiled = _before(call.fault) if call.fault else None
    if spoiled is not None:
        return spoiled
    try:
        reply = Reply(200, _handler(route.name)(call))
    except Refusal as refusal:
        reply = Reply(refusal.status, refusal.body)
    return _after(call.fault, reply) if call.fault else reply


def _handler(name: str) -> Callable[[Call], Any]:
    handler: Callable[[Call], Any] = getattr(api_instances, name, None) or getattr(api_account, name)
    return handler


def _key_of(request: web.Request) -> str | None:
    header = request.headers.get("Authorization", "")
    return header.removeprefix("Bearer ").strip() or request.query.get("api_key") or None


def _body(raw: bytes) -> dict[str, Any]:
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refusal(400, "invalid_request", "Invalid json body") from error
    if not isinstance(body, dict):
        raise Refusal(400, "invalid_request", "Invalid json body")
    return body


def _authorize(call: Call) -> None:
    if call.route.access == "anyone":
        return
    if call.key is None:
        raise no_key()
    owner = call.cloud.who(call.key)
    if owner is not None and (call.route.access != "instance" or owner != call.path.get("id")):
        raise Refusal(401, "not_authorized", f"This key can only start, stop and destroy instance {owner}.")


def _context(call: Call) -> dict[str, Any]:
    """What a fault may be tied to."""
    number = call.path.get("id")
    if call.route.name == "create":
        slot = call.cloud.asks.get(number or 0)
        return {"label": call.json.get("label"), "ask_id": number, "machine_id": slot[0] if slot else None}
    instance = call.cloud.instances.get(number or 0)
    return {"id": number, "label": instance.label if instance else None, "machine_id": instance.machine_id if instance else None}


def _before(fault: Fault) -> Reply | None:
    """The answer of a fault that strikes before anything is done."""
    if fault.what in _CUT_BEFORE:
        return Reply(500, {}, cut=True)
    if fault.what == "502_before":
        return Reply(502, "<html><body>502 Bad Gateway</body></html>", "text/html")
    if fault.what == "429_text":
        return Reply(429, "API requests too frequent", "text/plain")
    if fault.what == "429_json":
        return Reply(429, {"detail": _BUSY.format(fault.args.get("threshold", 2.0))})
    if fault.what == "success_false":
        return Reply(200, {"success": False, "error": "internal", "msg": fault.args.get("msg", "something went wrong")})
    if fault.what == "reply" and not fault.args.get("commit"):
        return _scripted(fault)
    return None


def _after(fault: Fault, reply: Reply) -> Reply:
    """The answer of a fault that strikes when the work is done."""
    if fault.what == "lost_reply":
        return Reply(500, {}, cut=True)
    if fault.what == "502_after":
        return Reply(502, "<html><body>502 Bad Gateway</body></html>", "text/html")
    if fault.what == "late":
        reply.delay_s = float(fault.args.get("delay_s", 1.0))
    if fault.what == "reply":
        return _scripted(fault)
    return reply


def _scripted(fault: Fault) -> Reply:
    body = fault.args.get("body", {"success": False, "error": "fault", "msg": "scripted"})
    kind = fault.args.get("content_type", "text/plain" if isinstance(body, str) else "application/json")
    return Reply(int(fault.args.get("status", 500)), body, kind, headers=fault.args.get("headers", {}))


def _too_soon(route: str | None, threshold_s: float) -> Reply:
    """429 comes as JSON from some endpoints and as bare text from most."""
    if route == "destroy":
        return Reply(429, {"success": False, "error": "rate_limit_exceeded", "msg": _BUSY.format(threshold_s)})
    if route == "create":
        return Reply(429, {"detail": _BUSY.format(threshold_s)})
    return Reply(429, f"API requests too frequent: endpoint threshold={threshold_s}", "text/plain")


def _result(emulator: Emulator, token: str) -> web.Response:
    """Logs and command output: not there at first, then there."""
    kept = emulator.results.get(token)
    if kept is None or kept.reads_until_ready > 0:
        if kept is not None:
            kept.reads_until_ready -= 1
        return web.Response(status=404, text="not found")
    return web.Response(text=kept.text)


@dataclass
class Kept:
    text: str
    reads_until_ready: int


def new_token() -> str:
    return secrets.token_hex(16)


async def _control(emulator: Emulator, request: web.Request) -> web.Response:
    """The emulator's own interface, for tests in another process: faults, clock, what exists, what was asked."""
    what = request.path.removeprefix("/_fake/").strip("/")
    cloud = emulator.cloud
    try:
        if (request.method, what) == ("POST", "faults"):
            specs = await request.json()
            for spec in specs if isinstance(specs, list) else [specs]:
                cloud.faults.add(spec)
            answer: Any = {"planned": len(cloud.faults.planned)}
        elif (request.method, what) == ("DELETE", "faults"):
            cloud.faults.clear()
            answer = {"planned": 0}
        elif (request.method, what) == ("POST", "clock"):
            emulator.advance(float((await request.json())["advance_s"]))
            answer = {"now": cloud.clock.now()}
        elif (request.method, what) == ("POST", "machines"):
            answer = {"machine_id": cloud.add_machine(**await request.json())}
        elif (request.method, what) == ("GET", "instances"):
            cloud.tick()
            answer = [one.row(cloud.clock.now()) for one in cloud.instances.values()]
        elif (request.method, what) == ("GET", "requests"):
            answer = emulator.requests
        elif (request.method, what) == ("GET", "charges"):
            answer = cloud.charges()
        else:
            return web.json_response({"error": f"no control called {request.method} {what}"}, status=404)
    except (ValueError, TypeError, KeyError) as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(answer)
