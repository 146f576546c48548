"""The HTTP side: turns requests into Calls, spoils them as the faults say, and logs them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ops.fakevast.alarm import Alarm
from ops.fakevast.boxes.boxes import Boxes
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.errors import ApiError, no_key
from ops.fakevast.http import account, instances, spoil
from ops.fakevast.http.call import Call, Response, StoredResults
from ops.fakevast.http.rate_limits import RateLimits, TooSoon
from ops.fakevast.http.routes import find_route

MAX_LOG = 200_000  # requests remembered
MAX_BODY_BYTES = 64 * 1024 * 1024


class Api:
    """The API of one cloud and the emulator's own controls, as one aiohttp application."""

    def __init__(
        self,
        cloud: Cloud,
        boxes: Boxes,
        alarm: Alarm,
        rate_limits: RateLimits,
        results: StoredResults,
    ) -> None:
        self.cloud, self.boxes, self.alarm = cloud, boxes, alarm
        self.rate_limits, self.results = rate_limits, results
        self.requests: list[dict[str, Any]] = []
        self.last_request = asyncio.get_running_loop().time()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.last_request = asyncio.get_running_loop().time()
        if (why := _stranger(request)) is not None:
            return web.json_response({"error": why}, status=403)
        if request.path.startswith("/_fake/"):
            if _key_of(request) != self.cloud.account.key:
                return web.json_response({"error": "controls need the account's key"}, status=403)
            return await self._control(request)
        if request.path.startswith("/_results/"):
            text = self.results.read(request.path.rsplit("/", 1)[1])
            return web.Response(status=404 if text is None else 200, text=text or "not found")
        raw = await request.read()
        entry: dict[str, Any] = {"t": self.cloud.clock.now(), "method": request.method}
        entry |= {"path": request.path_qs, "route": None, "status": None, "fault": None}
        self.requests.append(entry)
        if len(self.requests) > MAX_LOG:
            del self.requests[: MAX_LOG // 2]
        try:
            reply = self._answer(request, raw, entry)
        except ApiError as error:
            reply = Response(error.status, error.body)
        except TooSoon as early:
            reply = spoil.too_soon(entry["route"], early.threshold_s)
        finally:
            self.alarm.wake()
        entry["status"] = None if reply.cut else reply.status
        return await _sent(request, reply)

    def _answer(self, request: web.Request, raw: bytes, entry: dict[str, Any]) -> Response:
        """The whole life of a call but the sending.

        Nothing here awaits: calls are served one at a time, as by one database.
        """
        found = find_route(request.method, request.path)
        if found is None:
            message = f"fakevast does not emulate {request.method} {request.path}"
            return Response(501, {"success": False, "error": "not_emulated", "msg": message})
        route, path = found
        entry["route"] = route.name
        query, key = dict(request.query), _key_of(request)
        call = Call(self.cloud, self.boxes, self.results, route, path, query, key)
        _authorize(call)
        self.rate_limits.check(route.name, f"{key}{request.remote}", self.cloud.clock.now())
        call.json = _body(raw)
        call.fault = fault = self.cloud.faults.take(route.name, **_context(call))
        if fault is None:
            return Response(200, _handler(route.name)(call))
        entry["fault"] = fault.what
        if (spoiled := spoil.before(fault)) is not None:
            return spoiled
        try:
            reply = Response(200, _handler(route.name)(call))
        except ApiError as error:
            reply = Response(error.status, error.body)
        return spoil.after(fault, reply)

    async def _control(self, request: web.Request) -> web.Response:
        """The emulator's own interface, for tests in another process."""
        what = f"{request.method} {request.path.removeprefix('/_fake/').strip('/')}"
        if what not in CONTROLS:
            return web.json_response({"error": f"no control called {what}"}, status=404)
        try:
            body = await request.json() if request.method == "POST" else None
            return web.json_response(CONTROLS[what](self, body))
        except (ValueError, TypeError, KeyError) as error:
            return web.json_response({"error": str(error)}, status=400)


# ---- controls ----


def _add_faults(api: Api, specs: Any) -> Any:
    for spec in specs if isinstance(specs, list) else [specs]:
        api.cloud.faults.add(spec)
    return {"planned": len(api.cloud.faults.planned)}


def _clear_faults(api: Api, _: Any) -> Any:
    api.cloud.faults.clear()
    return {"planned": 0}


def _move_clock(api: Api, body: Any) -> Any:
    api.alarm.advance(float(body["advance_s"]))
    return {"now": api.cloud.clock.now()}


CONTROLS: dict[str, Callable[[Api, Any], Any]] = {
    "POST faults": _add_faults,
    "DELETE faults": _clear_faults,
    "POST clock": _move_clock,
    "POST machines": lambda api, body: {"machine_id": api.cloud.add_machine(**body)},
    "GET instances": lambda api, _: api.cloud.rows(),
    "GET requests": lambda api, _: api.requests,
    "GET charges": lambda api, _: api.cloud.charges(),
}


# ---- parts of a call ----


def _handler(name: str) -> Callable[[Call], Any]:
    handler: Callable[[Call], Any] = getattr(instances, name, None) or getattr(account, name)
    return handler


def _stranger(request: web.Request) -> str | None:
    """Why this is no call of ours: a web page, which names its origin, or reaches this machine by
    a name of its own."""
    if "Origin" in request.headers:
        return "calls of web pages are not answered"
    host = request.host.rpartition(":")[0] or request.host
    if host not in ("127.0.0.1", "localhost"):
        return f"{host!r} is not this machine's loopback"
    return None


def _key_of(request: web.Request) -> str | None:
    header = request.headers.get("Authorization", "")
    return header.removeprefix("Bearer ").strip() or request.query.get("api_key") or None


def _body(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw) if raw else {}
    except ValueError as error:
        raise ApiError(400, "invalid_request", "Invalid json body") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "Invalid json body")
    return body


def _authorize(call: Call) -> None:
    if call.route.access == "anyone":
        return
    if call.key is None:
        raise no_key()
    owner = call.cloud.who(call.key)
    if owner is not None and (call.route.access != "instance" or owner != call.path.get("id")):
        message = f"This key can only start, stop and destroy instance {owner}."
        raise ApiError(401, "not_authorized", message)


def _context(call: Call) -> dict[str, Any]:
    """What a fault may be tied to."""
    number = call.path.get("id")
    if call.route.name == "create":
        slot = call.cloud.asks.get(number or 0)
        machine_id = slot[0] if slot else None
        return {"label": call.json.get("label"), "ask_id": number, "machine_id": machine_id}
    instance = call.cloud.instances.get(number or 0)
    if instance is None:
        return {"id": number}
    return {"id": number, "label": instance.label, "machine_id": instance.machine_id}


async def _sent(request: web.Request, reply: Response) -> web.Response:
    if reply.delay_s:
        await asyncio.sleep(reply.delay_s)
    if reply.cut and request.transport is not None:
        request.transport.abort()
    body = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
    return web.Response(
        status=reply.status,
        body=body.encode(),
        content_type=reply.content_type,
        headers=reply.headers,
    )
