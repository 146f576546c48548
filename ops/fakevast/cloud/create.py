"""What `PUT /asks/{id}/` may ask for, and how vast.ai refuses the rest."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from ops.fakevast.cloud.errors import ApiError
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.search import price

MIN_DISK_GB = 8.0
MAX_IMAGE, MAX_LABEL, MAX_ENV, MAX_START = 1024, 256, 32768, 4096
RUNTYPES = {
    "ssh",
    "ssh_proxy",
    "ssh_direc",
    "ssh_direct",
    "jupyter",
    "jupyter_proxy",
    "jupyter_direc",
    "jupyter_direct",
    "args",
}


@dataclass(frozen=True)
class CreateRequest:
    """A valid create request."""

    image: str
    disk_gb: float
    env: dict[str, str]
    label: str | None
    onstart: str | None
    args: list[str]
    runtype: str
    bid: float | None
    cancel_unavail: bool
    target_state: str
    volume_info: Any
    template_hash_id: str | None


def parse_order(body: dict[str, Any], offer: dict[str, Any]) -> CreateRequest:
    """The order for this offer. Raises ApiError 400 naming the argument."""
    image, env = body.get("image"), body.get("env") or {}
    args = _args(body)
    onstart = body.get("onstart")
    _need(
        (isinstance(image, str) and image.strip() != "") or body.get("template_hash_id"),
        offer,
        "image",
        image,
    )
    _need(len(str(image or "")) <= MAX_IMAGE, offer, "image too long", len(str(image)))
    _need(isinstance(env, dict), offer, "env must be an object", env)
    _need(
        sum(len(str(k)) + len(str(v)) for k, v in env.items()) <= MAX_ENV,
        offer,
        "env longer than 32768",
        "",
    )
    _need(onstart is None or isinstance(onstart, str), offer, "onstart", onstart)
    _need(
        len(onstart or "") + sum(map(len, args)) <= MAX_START,
        offer,
        "args and onstart longer than 4096",
        len(onstart or ""),
    )
    label = body.get("label")
    _need(
        label is None or (isinstance(label, str) and len(label) <= MAX_LABEL),
        offer,
        "label",
        label,
    )
    runtype = body.get("runtype") or ("args" if body.get("args") is not None else "ssh")
    _need(isinstance(runtype, str) and set(runtype.split()) <= RUNTYPES, offer, "runtype", runtype)
    target = body.get("target_state") or "running"
    _need(target in ("running", "stopped"), offer, "target_state", target)
    return CreateRequest(
        image=str(image or "template"),
        disk_gb=_disk(body, offer),
        env={str(key): str(value) for key, value in env.items()},
        label=label,
        onstart=onstart,
        args=args,
        runtype=runtype,
        bid=_bid(body, offer),
        cancel_unavail=bool(body.get("cancel_unavail")),
        target_state=target,
        volume_info=body.get("volume_info"),
        template_hash_id=body.get("template_hash_id"),
    )


def new_instance(
    number: int,
    key: str,
    row: dict[str, Any],
    order: CreateRequest,
    now: float,
    ssh_keys: list[dict[str, Any]],
) -> Instance:
    """The instance that an order makes of an offer's row, at `now` (epoch seconds)."""
    return Instance(
        id=number,
        ask_id=row["id"],
        offer=price(row, order.disk_gb, order.bid is not None),
        created_at=now,
        settled_at=now,
        end_date=row["end_date"],
        key=key,
        image=order.image,
        disk_gb=order.disk_gb,
        label=order.label,
        env=order.env,
        onstart=order.onstart,
        args=order.args,
        runtype=order.runtype,
        bid=order.bid,
        volume_info=order.volume_info,
        template_hash_id=order.template_hash_id,
        ssh_keys=ssh_keys,
    )


def _need(holds: Any, offer: dict[str, Any], what: str, value: Any) -> None:
    if not holds:
        raise ApiError(
            400,
            "invalid_args",
            f"error 400/3467: Invalid args: {what} ({value!r})",
            ask_id=offer["id"],
        )


def _args(body: dict[str, Any]) -> list[str]:
    args = body.get("args") or []
    words = shlex.split(args) if isinstance(args, str) else [str(word) for word in args]
    return words + shlex.split(body.get("args_str") or "")


def _disk(body: dict[str, Any], offer: dict[str, Any]) -> float:
    try:
        disk = float(body.get("disk") or 10.0)
    except (TypeError, ValueError):
        disk = -1.0
    _need(disk >= MIN_DISK_GB, offer, "disk below 8 GB", body.get("disk"))
    _need(
        disk <= offer["disk_space"],
        offer,
        f"disk above the {offer['disk_space']} GB of this offer",
        disk,
    )
    return disk


def _bid(body: dict[str, Any], offer: dict[str, Any]) -> float | None:
    price = body.get("price")
    if price is None:
        return None
    if not isinstance(price, (int, float)) or isinstance(price, bool) or not 0.001 <= price <= 128:
        text = (
            "error 400/3460: invalid_price price must be a number between 0.001 and 128, not "
            f"{price!r}"
        )
        raise ApiError(400, "invalid_price", text, ask_id=offer["id"])
    return float(price)
