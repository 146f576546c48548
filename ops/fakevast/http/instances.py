"""Handlers of the calls about offers and instances. Each takes a Call and returns the JSON body, or
raises ApiError."""

from __future__ import annotations

import base64
import json
import shlex
from collections import Counter
from typing import Any

from ops.fakevast.cloud.catalogue import CARDS
from ops.fakevast.cloud.errors import ApiError, no_such_ask
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.record import record
from ops.fakevast.http.call import Call

PAGE = 25
_COMPUTED = {
    "dph_total",
    "num_gpus",
    "gpu_name",
    "duration",
    "search",
    "instance",
    "uptime_mins",
    "storage_total_cost",
}


def gpu_names(call: Call) -> Any:
    return {"success": True, "gpu_names": sorted(CARDS)}


def search(call: Call) -> Any:
    return {"offers": call.cloud.search(call.json)}


def search_asks(call: Call) -> Any:
    return {"success": True, "offers": call.cloud.search(call.json.get("q") or {})}


def create(call: Call) -> Any:
    ask_id = call.path["id"]
    if call.fault and call.fault.what == "no_such_ask":
        raise no_such_ask(ask_id, int(call.fault.args.get("status", 404)))
    if call.fault and call.fault.what in ("insufficient_credit", "spend_rate_limit"):
        raise ApiError(
            int(call.fault.args.get("status", 400)),
            call.fault.what,
            f"error 400/3580: {call.fault.what}",
        )
    reply = call.cloud.create(ask_id, call.json, call.key)
    instance = call.cloud.instances[reply["new_contract"]]
    if call.fault and call.fault.what == "list_lag":
        places = call.fault.args.get("in", ["list", "show"])
        instance.hidden_reads |= dict.fromkeys(
            [places] if isinstance(places, str) else places, int(call.fault.args.get("reads", 3))
        )
    if call.fault and call.fault.what == "wrong_fields":
        instance.shown_as |= call.fault.args["fields"]
    return reply


def launch(call: Call) -> Any:
    """Search and create in one call."""
    offers = call.cloud.search(call.json.get("q") or {})
    if not offers:
        raise ApiError(404, "no_such_ask", "error 404/3603: no_such_ask No offers match the query.")
    return call.cloud.create(offers[0]["id"], call.json, call.key)


# ---- reading
# --------------------------------------------------------------------------------------------------


def list_v0(call: Call) -> Any:
    """The older list, whole: 410 unless `settings.v0_list` (the live service answers it for some
    accounts)."""
    if call.cloud.settings.v0_list:
        return {"instances": _listed(call)}
    raise ApiError(
        410,
        "deprecated_endpoint",
        "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead.",
    )


def list(call: Call) -> Any:
    """One page of the rows that match."""
    rows = [row for row in _listed(call) if _matches(row, call.query("select_filters", {}))]
    for rule in reversed(call.query("order_by", [{"col": "id", "dir": "asc"}])):
        rows.sort(
            key=lambda row: (row.get(rule["col"]) is not None, row.get(rule["col"])),
            reverse=rule.get("dir") == "desc",
        )
    limit = int(call.query("limit", PAGE))
    limit = 5 if limit <= 0 else min(limit, PAGE)
    start = _from_token(call.request_query.get("after_token"))
    page, rest = rows[start : start + limit], len(rows) > start + limit
    if columns := call.query("select_cols", None):
        page = (
            page if "*" in columns else [{name: row.get(name) for name in columns} for row in page]
        )
    return {
        "success": True,
        "instances_found": len(page),
        "total_instances": len(rows),
        "label_counts": dict(Counter(row["label"] for row in rows if row["label"] is not None)),
        "next_token": base64.urlsafe_b64encode(
            json.dumps({"from": start + limit}).encode()
        ).decode()
        if rest
        else None,
        "instances": page,
    }


def _listed(call: Call) -> Any:
    """The rows of a list: those of destroyed instances where a fault keeps them, without new ones
    that are late."""
    call.cloud.tick()
    now = call.cloud.clock.now()
    rows = [record(one, now) for one in call.cloud.instances.values() if not _late(one, "list")]
    return rows + [
        _ghost(call, number) for number in [*call.cloud.ghosts] if _haunts(call, number, "list")
    ]


def _from_token(token: str | None) -> int:
    if not token:
        return 0
    try:
        return int(json.loads(base64.urlsafe_b64decode(token))["from"])
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(
            400, "invalid_request", "Error in query parameters: after_token is invalid"
        ) from error


def _matches(row: dict[str, Any], filters: dict[str, Any]) -> bool:
    for column, tests in filters.items():
        if column in _COMPUTED or column not in row:
            raise ApiError(
                400,
                "invalid_request",
                f"Error in query parameters: {column} is not a valid search key",
            )
        for op, wanted in (tests if isinstance(tests, dict) else {"eq": tests}).items():
            same = {"eq": row[column] == wanted, "neq": row[column] != wanted}
            inside = isinstance(wanted, (tuple, type([]))) and row[column] in wanted
            answer = same.get(op, inside if op == "in" else not inside if op == "notin" else None)
            if answer is None:
                value = row[column]
                answer = (
                    value is not None
                    and {
                        "gt": value > wanted,
                        "gte": value >= wanted,
                        "lt": value < wanted,
                        "lte": value <= wanted,
                    }[op]
                )
            if not answer:
                return False
    return True


def _late(instance: Instance, place: str) -> bool:
    """Whether a read still misses the new instance (read-after-create lag); counts this read."""
    left = instance.hidden_reads.get(place, 0)
    instance.hidden_reads[place] = max(0, left - 1)
    return left > 0


def _haunts(call: Call, number: int, place: str) -> bool:
    """Whether a destroyed instance is still shown there; counts this read."""
    left = call.cloud.ghosts.get(number, {}).get(place, 0)
    if left > 0:
        call.cloud.ghosts[number][place] = left - 1
    return left > 0


def _ghost(call: Call, number: int) -> dict[str, Any]:
    row = record(call.cloud.destroyed[number], call.cloud.clock.now())
    return row | {
        "actual_status": "running",
        "cur_state": "running",
        "next_state": "stopped",
        "intended_status": "stopped",
    }


def instance_filters(call: Call) -> Any:
    rows = [record(one, call.cloud.clock.now()) for one in call.cloud.instances.values()]
    columns = ("actual_status", "gpu_name", "geolocation", "label")
    return {
        "success": True,
        "filters": [
            {"col": name, "values": sorted({str(row[name]) for row in rows})} for name in columns
        ],
    }


def show(call: Call) -> Any:
    """A destroyed or unknown instance is `null` with status 200."""
    number = call.path["id"]
    call.cloud.tick()
    if _haunts(call, number, "show"):
        return {"instances": _ghost(call, number)}
    instance = call.cloud.instances.get(number)
    return {
        "instances": None
        if instance is None or _late(instance, "show")
        else record(instance, call.cloud.clock.now())
    }


def balance(call: Call) -> Any:
    call.cloud.get(call.path["id"])
    return {"success": True, "balance": 0.0, "total": 0.0}


# ---- changing
# --------------------------------------------------------------------------------------------------


def set_instance(call: Call) -> Any:
    instance = call.cloud.get(call.path["id"], call.key)
    if "label" in call.json:
        if len(str(call.json["label"])) > 1024:
            raise ApiError(400, "label_too_long", "Label must be at most 1024 characters")
        instance.label = call.json["label"]
        return {"success": True}
    return call.cloud.set_state(instance.id, str(call.json.get("state")), call.key)


def destroy(call: Call) -> Any:
    number, cloud, fault = call.path["id"], call.cloud, call.fault
    if fault and fault.what in ("ignored", "resurrect"):
        instance = cloud.get(number, call.key)
        if fault.what == "resurrect":
            instance.hidden_reads = dict.fromkeys(("list", "show"), int(fault.args.get("reads", 2)))
        return {"success": True}
    reply = cloud.destroy(number, call.key)
    if fault and fault.what == "still_listed":
        cloud.ghosts[number] = dict.fromkeys(("list", "show"), int(fault.args.get("reads", 2)))
    return reply


def reboot(call: Call) -> Any:
    return call.cloud.reboot(call.path["id"])


def recycle(call: Call) -> Any:
    instance = call.cloud.get(call.path["id"])
    instance.pulled = False
    call.boxes.live[instance.id].clear()
    return call.cloud.reboot(instance.id, "recycling")


def change_bid(call: Call) -> Any:
    return call.cloud.change_bid(call.path["id"], call.json.get("price"))


def price_increases(call: Call) -> Any:
    """What hosts ask and nobody has answered."""
    rows = [one.row() for one in call.cloud.price_increases.values() if one.status == "pending"]
    return {
        "success": True,
        "count": len(rows),
        "truncated": False,
        "pending_price_increases": rows,
    }


def accept_price(call: Call) -> Any:
    number = _pending(call)
    call.cloud.raise_price(number)
    return _answered(call, number)


def reject_price(call: Call) -> Any:
    number = _pending(call)
    call.cloud.price_increases[number].status = "rejected"
    return _answered(call, number)


def _pending(call: Call) -> int:
    """The number that the call names. Raises ApiError where no such increase is pending."""
    number = call.json.get("pending_price_increase_id")
    found = call.cloud.price_increases.get(number) if isinstance(number, int) else None
    if found is None or found.status != "pending":
        raise ApiError(404, "no_pending_price_increase", "There is no such price increase.")
    return found.number


def _answered(call: Call, number: int) -> Any:
    contract = call.cloud.price_increases[number].instance_id
    return {"success": True, "pending_price_increase_id": number, "contract_id": contract}


def update_instance(call: Call) -> Any:
    """Change what a container is made of; it takes effect at the next recycle or start."""
    instance = call.cloud.get(call.path["id"])
    for name in ("image", "onstart", "args", "env"):
        if call.json.get(name) is not None:
            setattr(instance, name, call.json[name])
    return {"success": True}


# ---- logs and commands
# ----------------------------------------------------------------------------------------------


def logs(call: Call) -> Any:
    number = call.path["id"]
    if number not in call.cloud.instances:
        raise ApiError(404, "invalid_id", f"error 404/3330: Instance {number} not found.")
    instance = call.cloud.get(number)
    lines = call.boxes.live[number].log()
    if call.json.get("daemon_logs"):
        lines = [f"daemon: {instance.actual_status} {instance.status_msg or ''}"]
    if wanted := call.json.get("filter"):
        lines = [line for line in lines if str(wanted) in line]
    if tail := call.json.get("tail"):
        lines = lines[-int(tail) :]
    return {
        "success": True,
        "result_url": call.results.store("\n".join(lines) + "\n"),
        "msg": "Logs are being fetched.",
    }


def command(call: Call) -> Any:
    """Run a command in a box, stopped ones too. As at vast.ai only ls, rm and du are allowed."""
    instance = call.cloud.get(call.path["id"])
    text = str(call.json.get("command") or "")
    words = shlex.split(text)
    if len(text) > 512 or not words or words[0] not in ("ls", "rm", "du"):
        raise ApiError(
            400,
            "invalid_args",
            "error 400/3310: Invalid args: only ls, rm and du of at most 512 characters",
        )
    output = call.boxes.live[instance.id].execute(words)
    return {
        "success": True,
        "writeable_path": "/root",
        "result_url": call.results.store(output),
        "msg": "Command is executing, wait...",
    }
