"""Faults of the API: an answer in place of the work, or in place of the work's own answer."""

from __future__ import annotations

from ops.fakevast.cloud.faults import Fault
from ops.fakevast.http.call import Response

BUSY = "API requests too frequent endpoint threshold={}"
_GATEWAY = "<html><body>502 Bad Gateway</body></html>"


def before(fault: Fault) -> Response | None:
    """The answer of a fault that strikes before anything is done."""
    if fault.what == "lost_request":
        return Response(500, {}, cut=True)
    if fault.what == "502_before":
        return Response(502, _GATEWAY, "text/html")
    if fault.what == "429_text":
        return Response(429, "API requests too frequent", "text/plain")
    if fault.what == "429_json":
        return Response(429, {"detail": BUSY.format(fault.args.get("threshold", 2.0))})
    if fault.what == "success_false":
        message = fault.args.get("msg", "something went wrong")
        return Response(200, {"success": False, "error": "internal", "msg": message})
    if fault.what == "reply" and not fault.args.get("commit"):
        return _scripted(fault)
    return None


def after(fault: Fault, reply: Response) -> Response:
    """The answer of a fault that strikes when the work is done."""
    if fault.what == "lost_reply":
        return Response(500, {}, cut=True)
    if fault.what == "502_after":
        return Response(502, _GATEWAY, "text/html")
    if fault.what == "late":
        reply.delay_s = float(fault.args.get("delay_s", 1.0))
    if fault.what == "reply":
        return _scripted(fault)
    return reply


def _scripted(fault: Fault) -> Response:
    body = fault.args.get("body", {"success": False, "error": "fault", "msg": "scripted"})
    usual = "text/plain" if isinstance(body, str) else "application/json"
    kind = fault.args.get("content_type", usual)
    headers = fault.args.get("headers", {})
    return Response(int(fault.args.get("status", 500)), body, kind, headers=headers)


def too_soon(route: str | None, threshold_s: float) -> Response:
    """A broken rate limit: 429 comes as JSON from some endpoints and as bare text from most."""
    busy = BUSY.format(threshold_s)
    if route == "destroy":
        return Response(429, {"success": False, "error": "rate_limit_exceeded", "msg": busy})
    if route == "create":
        return Response(429, {"detail": busy})
    text = f"API requests too frequent: endpoint threshold={threshold_s}"
    return Response(429, text, "text/plain")
