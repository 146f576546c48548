"""Handlers of the calls about the account: keys, money, secrets, and the lists that are empty for a
new customer."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from ops.fakevast.cloud.errors import ApiError
from ops.fakevast.http.call import Call

DAY_S = 86400
_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")


def user(call: Call) -> Any:
    account, cloud = call.cloud.account, call.cloud
    credit = cloud.credit()
    return {
        "id": account.id,
        "email": "maker@example.com",
        "username": "maker",
        "fullname": "A Maker",
        "credit": credit,
        "balance": 0.0,
        "sid": "fakevast",
        "host_agreement_accepted": False,
        "can_pay": True,
        "has_billing": True,
        "api_key": account.key,
        "host_only": False,
        "balance_threshold": 0.0,
        "balance_threshold_enabled": False,
        "autobill_threshold": None,
        "got_signup_credit": 0,
        "rights": {},
        "ssh_key": account.ssh_keys[-1]["public_key"] if account.ssh_keys else None,
        "total_spend": -cloud.spent_usd(),
        "twofactor": False,
        "paid_verified": 1.0,
        "buyer_type": "individual",
        "seller_type": None,
        "billaddress_country": None,
        "last4": None,
    }


# ---- money
# --------------------------------------------------------------------------------------------------


def charges(call: Call) -> Any:
    """What each instance cost, newest last unless `latest_first`. The window is required; charges
    are kept by the day (UTC)."""
    filters = call.query("select_filters", {})
    window = filters.get("day")
    if not isinstance(window, dict) or "gte" not in window or "lte" not in window:
        raise ApiError(
            400,
            "invalid_request",
            "Error in query parameters: select_filters.day needs gte and lte",
        )
    wanted = (filters.get("type") or {}).get("in", ["instance"])
    first_day, last_day = int(window["gte"]) // DAY_S, int(window["lte"]) // DAY_S
    rows = [
        row
        for row in call.cloud.charges()
        if row["end"] // DAY_S >= first_day and row["start"] // DAY_S <= last_day
    ]
    rows = [row for row in rows if row["type"] in wanted]
    rows.sort(key=lambda row: row["start"], reverse=bool(call.query("latest_first", False)))
    return _page(call, rows)


def _page(call: Call, rows: list[dict[str, Any]]) -> dict[str, Any]:
    limit = min(int(call.query("limit", 20)), 100)
    start = int(call.request_query.get("after_token") or 0)
    page = rows[start : start + limit]
    more = str(start + limit) if len(rows) > start + limit else None
    return {
        "success": True,
        "count": len(page),
        "total": len(rows),
        "next_token": more,
        "results": page,
    }


def invoices_v1(call: Call) -> Any:
    return _page(call, [_payment(call)])


def _payment(call: Call) -> dict[str, Any]:
    return {
        "id": 1,
        "type": "payment",
        "when": call.cloud.account.opened_at,
        "amount": call.cloud.settings.credit_usd,
        "service": "fakevast",
        "description": "Play money",
        "is_credit": True,
        "source": "fakevast",
        "start": call.cloud.account.opened_at,
        "end": None,
        "items": [],
        "metadata": {},
    }


def invoices(call: Call) -> Any:
    """The older report: one row a charge item, and what is owed now."""
    rows: list[dict[str, Any]] = []
    if call.query("inc_charges", True):
        for charge in call.cloud.charges():
            for item in charge["items"]:
                rows.append(
                    {
                        "type": "charge",
                        "instance_id": charge["metadata"]["instance_id"],
                        "timestamp": item["start"],
                        "amount": item["amount"],
                        "description": f"Instance {charge['metadata']['instance_id']} "
                        f"{item['type']}: {item['description']}",
                        "quantity": "1",
                        "rate": item["amount"],
                        "is_credit": False,
                    }
                )
    spent = call.cloud.spent_usd()
    return {
        "invoices": rows,
        "current": {
            "charges": spent,
            "service_fee": 0.0,
            "total": spent,
            "credit": call.cloud.credit(),
        },
    }


# ---- SSH keys
# --------------------------------------------------------------------------------------------------


def _public_key(call: Call) -> str:
    text = str(call.json.get("ssh_key") or "").strip()
    if not text.startswith(_KEY_TYPES) or len(text.split()) < 2:
        raise ApiError(
            400, "no_ssh_key", "error 400/3400: no_ssh_key Please provide a public ssh key."
        )
    return text


def _key_row(call: Call, text: str) -> dict[str, Any]:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(call.cloud.clock.now()))
    account = call.cloud.account
    return {
        "id": account.next_key_id(),
        "user_id": account.id,
        "key": text,
        "public_key": text,
        "created_at": made,
        "deleted_at": None,
    }


def ssh_keys(call: Call) -> Any:
    return call.cloud.account.ssh_keys


def add_ssh_key(call: Call) -> Any:
    """Add a key for instances created from now on; those that exist need attach_ssh."""
    row = _key_row(call, _public_key(call))
    call.cloud.account.ssh_keys.append(row)
    return {"success": True, "key": row}


def update_ssh_key(call: Call) -> Any:
    row = _own_key(call, call.path["id"])
    row["key"] = row["public_key"] = _public_key(call)
    return {"success": True, "key": row}


def delete_ssh_key(call: Call) -> Any:
    call.cloud.account.ssh_keys.remove(_own_key(call, call.path["id"]))
    return {"success": True}


def _own_key(call: Call, number: int) -> dict[str, Any]:
    for row in call.cloud.account.ssh_keys:
        if row["id"] == number:
            return row
    raise ApiError(404, "not_found", f"SSH key {number} not found")


def instance_ssh(call: Call) -> Any:
    keys = call.cloud.get(call.path["id"]).ssh_keys
    return {
        "success": True,
        "ssh_keys": json.dumps(
            [{"id": key["id"], "public_key": key["public_key"]} for key in keys]
        ),
    }


def attach_ssh(call: Call) -> Any:
    """Add a key to one instance; its box, running or not, has it `settings.key_delay_s` later."""
    instance = call.cloud.get(call.path["id"])
    since = call.cloud.clock.now() + call.cloud.settings.key_delay_s
    instance.ssh_keys.append(_key_row(call, _public_key(call)) | {"since": since})
    return {"success": True, "msg": "SSH key attached successfully"}


def detach_ssh(call: Call) -> Any:
    instance = call.cloud.get(call.path["id"])
    left = [key for key in instance.ssh_keys if key["id"] != call.path["key"]]
    if len(left) == len(instance.ssh_keys):
        raise ApiError(404, "not_found", f"SSH key {call.path['key']} is not attached")
    instance.ssh_keys = left
    return {"success": True, "msg": "SSH key removed"}


# ---- API keys and secrets
# -------------------------------------------------------------------------------------------


def api_keys(call: Call) -> Any:
    return [
        {key: value for key, value in row.items() if key != "key"}
        for row in call.cloud.account.api_keys
    ]


def add_api_key(call: Call) -> Any:
    number = call.cloud.account.next_key_id()
    secret = hashlib.sha256(f"api key {number} of {call.cloud.account.key}".encode()).hexdigest()
    row = {
        "id": number,
        "name": call.json.get("name"),
        "rights": call.json.get("permissions") or {},
        "key": secret,
    }
    call.cloud.account.api_keys.append(row)
    return {"success": True, **row}


def api_key(call: Call) -> Any:
    for row in call.cloud.account.api_keys:
        if row["id"] == call.path["id"]:
            return row
    raise ApiError(404, "not_found", "API key not found")


def delete_api_key(call: Call) -> Any:
    call.cloud.account.api_keys.remove(api_key(call))
    return {"success": True}


def secrets(call: Call) -> Any:
    return {"success": True, "secrets": call.cloud.account.secrets}


def add_secret(call: Call) -> Any:
    """Set a variable in the environment of every box that starts from now on."""
    call.cloud.account.secrets[str(call.json.get("key"))] = str(call.json.get("value"))
    return {"success": True, "msg": "Environment variable set"}


update_secret = add_secret


def delete_secret(call: Call) -> Any:
    if call.cloud.account.secrets.pop(str(call.json.get("key")), None) is None:
        raise ApiError(404, "not_found", "No such environment variable")
    return {"success": True, "msg": "Environment variable deleted"}


# ---- what a new customer has none of
# --------------------------------------------------------------------------------


def ipaddrs(call: Call) -> Any:
    return {
        "success": True,
        "results": [
            {"ip": "127.0.0.1", "first_seen": call.cloud.account.opened_at, "first_location": None}
        ],
    }


def templates(call: Call) -> Any:
    return {"success": True, "templates": [], "templates_found": 0}


def volumes(call: Call) -> Any:
    return {"success": True, "volumes": []}
