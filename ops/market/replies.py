"""Pure: what vast.ai's replies mean: rows, charges, and the error for a reply that says no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ops.errors import MarketError, NoAnswer, OfferGone, RateLimited, Refused
from ops.market.models import Offer

QUOTA = "search_quota_exceeded"  # vast.ai's code: no search until the next day
TAKEN = (404, 409, 410)  # what a create is answered when its offer is gone, in whatever words
BAD_ROW = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
)  # what parsing a malformed row raises


@dataclass(frozen=True)
class Charge:
    """One line of the bill: kind is "gpu", "disk", "bwd" (bytes into the box) or "bwu" (out of
    it)."""

    kind: str
    usd: float
    description: str


def label_of(row: dict[str, Any]) -> str:
    return str(row.get("label") or "").strip()


def parse_charge(item: dict[str, Any]) -> Charge:
    return Charge(
        str(item.get("type")), float(item.get("amount") or 0), str(item.get("description", ""))
    )


def rate_limited(what: str, content: Any) -> RateLimited:
    """The error for HTTP 429; for the day's quota it says when to come again."""
    code, words = code_of(content), message_of(content)
    if code != QUOTA:
        return RateLimited(f"{what}: {words}", code=code)
    wait_s = content.get("retry_after")
    known = isinstance(wait_s, int | float) and 0 < wait_s < 2 * 86400
    when = f"in {wait_s / 3600:.1f} h" if known else "after midnight UTC"
    return RateLimited(
        f"{what}: the searches of this day are used up: {words}", code=code, hint=f"again {when}"
    )


def refusal(status: int, content: Any, *, creating: bool = False) -> MarketError:
    """The error for a reply that says no, to a create where `creating`. `instance_id` is set when
    the reply names a contract that it created all the same."""
    code, words = code_of(content), message_of(content)
    contract = content.get("new_contract") if isinstance(content, dict) else None
    kind: type[MarketError] = Refused
    taken = status in TAKEN and code != "auth_error" and contract is None
    if "no_such_ask" in code + words or (creating and taken):
        kind, what, hint = OfferGone, f"the offer is gone: {words}", None
    elif code == "auth_error":
        what = f"vast.ai does not accept the key: {words}"
        hint = "set VAST_API_KEY to a key from https://cloud.vast.ai/manage-keys/"
    elif "credit" in code + words or code == "spend_rate_limit":
        what = f"vast.ai refuses for lack of credit: {words}"
        hint = "add credit at https://cloud.vast.ai/billing/"
    else:
        what = f"vast.ai refused ({status}): {words}"
        hint = "`milktea explain RUN` shows what was asked"
    return kind(
        what, code=code, instance_id=contract if isinstance(contract, int) else None, hint=hint
    )


def is_gone(e: Refused) -> bool:
    """404 for a wrong key is not 'destroyed': only these codes are."""
    return e.code in ("no_such_instance", "not_found")


def code_of(content: Any) -> str:
    """vast.ai's own code of a refusal; "" where the reply has none."""
    return str(content.get("error") or "") if isinstance(content, dict) else ""


def validate_list(page: dict[str, Any]) -> None:
    """Raises NoAnswer for a page of instances that has no list: nothing follows from it."""
    if not isinstance(page.get("instances"), list):
        raise NoAnswer(f"vast.ai's list of instances has no list in it: {str(page)[:200]}")


def message_of(content: Any) -> str:
    """vast.ai's words in a reply, shortened."""
    if not isinstance(content, dict):
        return str(content)[:200]
    return str(content.get("msg") or content.get("detail") or content.get("error") or content)[:300]


def reason_of(e: Exception) -> str:
    return str(e).split("(Caused by ")[-1][:200]


def parse_offers(parse: Callable[[dict[str, Any]], Offer], rows: Any) -> list[Offer]:
    """The offers in a search's rows."""
    offers = []
    for row in rows if isinstance(rows, list) else []:
        try:
            offers.append(parse(row))
        except BAD_ROW:
            continue  # an offer that cannot be parsed is never rented
    return offers
