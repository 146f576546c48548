"""Which offers answer a query, at which price: the filters, the order and the 64-row cap of
`POST /bundles/`. Pure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from ops.fakevast.cloud.catalogue import driver_number
from ops.fakevast.cloud.errors import ApiError

MAX_ROWS = 64
HOURS_PER_MONTH = 720  # vast.ai's month has 30 days
DEFAULT_STORAGE_GB = 5.0
_NOT_FILTERS = {
    "order",
    "type",
    "limit",
    "allocated_storage",
    "disable_bundling",
    "resource_type",
    "select_cols",
    "sort_option",
    "extra_ids",
}
_ALIAS = {
    "cuda_vers": "cuda_max_good",
    "dph": "dph_total",
    "dlperf_usd": "dlperf_per_dphtotal",
    "flops_usd": "flops_per_dphtotal",
    "display_active": "gpu_display_active",
}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "neq": operator.ne,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def price(row: dict[str, Any], storage_gb: float, bid: bool) -> dict[str, Any]:
    """The row as quoted for so much disk: dph_total and what follows from it. USD per hour."""
    base = row["min_bid"] if bid else row["dph_base"]
    disk_hour = storage_gb * row["storage_cost"] / HOURS_PER_MONTH
    total = base + disk_hour
    quote = {
        "gpuCostPerHour": base,
        "diskHour": disk_hour,
        "totalHour": total,
        "discountTotalHour": 0,
        "discountedTotalPerHour": total,
    }
    return row | {
        "dph_base": base,
        "storage_total_cost": disk_hour,
        "dph_total": total,
        "dph_total_adj": total,
        "is_bid": bid,
        "dlperf_per_dphtotal": row["dlperf"] / total if total else None,
        "flops_per_dphtotal": row["total_flops"] / total if total else None,
        "search": quote,
        "instance": quote
        | {"gpuCostPerHour": 0, "totalHour": disk_hour, "discountedTotalPerHour": disk_hour},
    }


def find(rows: Iterable[dict[str, Any]], query: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that pass, priced, ordered and capped. Raises ApiError 400 for a column or an
    operator that there is not."""
    if not isinstance(query, dict):
        raise ApiError(400, "invalid_request", "Invalid json body")
    storage = _number(query.get("allocated_storage"), DEFAULT_STORAGE_GB)
    bid = query.get("type") in ("bid", "interruptible")
    filters = [(name, tests) for name, tests in query.items() if name not in _NOT_FILTERS]
    priced = [price(row, storage, bid) for row in rows if row["disk_space"] >= storage]
    found = [row for row in priced if all(_passes(row, name, tests) for name, tests in filters)]
    for column, way in reversed(_order(query.get("order"))):
        found.sort(key=lambda row: _sortable(row.get(column)), reverse=way == "desc")
    limit = int(_number(query.get("limit"), MAX_ROWS))
    return found[: min(limit if limit > 0 else MAX_ROWS, MAX_ROWS)]


def _number(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ApiError(400, "invalid_request", f"Invalid number {value!r}") from error


def _order(order: Any) -> list[tuple[str, str]]:
    """[["dph_total", "asc"], ...] or [{"col": ..., "dir": ...}, ...]."""
    try:
        pairs = [
            (str(item[0]), str(item[1]))
            if isinstance(item, list)
            else (str(item["col"]), str(item["dir"]))
            for item in order or []
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise ApiError(
            400, "invalid_request", f"Error in query parameters: order {order!r}"
        ) from error
    return [(_ALIAS.get(column, column), way) for column, way in pairs]


def _sortable(value: Any) -> tuple[int, Any]:
    if value is None:
        return (0, 0)
    return (1, float(value)) if isinstance(value, (int, float)) else (2, str(value))


def _passes(row: dict[str, Any], name: str, tests: Any) -> bool:
    if not isinstance(tests, dict):
        tests = {"eq": tests}
    return all(_test(row, name, op, wanted) for op, wanted in tests.items())


def _test(row: dict[str, Any], name: str, op: str, wanted: Any) -> bool:
    """One comparison. Numbers may come as strings; a place is filtered by country code; a few
    columns exist only here."""
    value = _column(row, _ALIAS.get(name, name))
    if name == "geolocation":
        value = str(value).rsplit(",", 1)[-1].strip()
    if name == "driver_version":
        value = driver_number(str(value))
        wanted = (
            [driver_number(item) if "." in str(item) else item for item in wanted]
            if isinstance(wanted, list)
            else (driver_number(wanted) if "." in str(wanted) else wanted)
        )
    if op in ("in", "notin", "not in"):
        inside = any(
            _alike(value, item)[0] == _alike(value, item)[1]
            for item in (wanted if isinstance(wanted, list) else [wanted])
        )
        return inside == (op == "in")
    if op not in _OPERATORS:
        raise ApiError(
            400, "invalid_request", f"Error in query parameters: {op} is not a valid operator"
        )
    if value is None or wanted is None:
        return op in ("eq", "neq") and _OPERATORS[op](value, wanted)
    left, right = _alike(value, wanted)
    if isinstance(left, float) == isinstance(right, float) and not isinstance(wanted, (dict, list)):
        return _OPERATORS[op](left, right)
    if op in ("eq", "neq") and not isinstance(wanted, (dict, list)):
        return op == "neq"  # a word is not a number
    raise ApiError(
        400, "invalid_request", f"Error in query parameters: cannot compare {name} with {wanted!r}"
    )


def _column(row: dict[str, Any], name: str) -> Any:
    if name == "id":
        # as seen on the live service: a filter on id matches nothing, ask_contract_id does
        return None
    if name == "verified":
        return row["verification"] == "verified"
    if name == "datacenter":
        return row["hosting_type"] == 1
    if name not in row:
        raise ApiError(
            400, "invalid_request", f"Error in query parameters: {name} is not a valid search key"
        )
    return row[name]


def _alike(value: Any, wanted: Any) -> tuple[Any, Any]:
    """Both sides as numbers where the column is one: the client sends "1" for 1 and "true" may
    stand for True."""
    if isinstance(value, bool):
        return value, wanted.lower() == "true" if isinstance(wanted, str) else bool(wanted)
    if isinstance(value, (int, float)) and not isinstance(wanted, list):
        try:
            return float(value), float(wanted)
        except (TypeError, ValueError):
            return value, wanted
    return str(value), str(wanted)
