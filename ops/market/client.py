"""The only module that speaks to vast.ai, through the `vastai` package's HTTP client; replies are
parsed here.

The package's SDK functions are not used: they send a create again when its answer was lost, and
they drop the server's message. Reads are repeated here, within `PATIENCE_S`; a create never is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from vastai.api.instances import build_create_instance_payload

from ops.errors import MarketError, NoAnswer, RateLimited, Refused
from ops.market import http
from ops.market.models import ROWS, Instance, Offer, parse_instance, parse_offer
from ops.market.provider import VAST_AI, Provider
from ops.market.replies import (
    BAD_ROW,
    QUOTA,
    Charge,
    code_of,
    is_gone,
    label_of,
    message_of,
    parse_charge,
    parse_offers,
    rate_limited,
    reason_of,
    refusal,
    validate_list,
)
from ops.wait import Clock, until

# Minimum seconds between two calls of one kind (vast.ai's documented thresholds; it answers 429
# below them).
INTERVAL_S = {
    "search": 1.0,
    "create": 4.5,
    "list": 1.0,
    "show": 2.0,
    "destroy": 3.0,
    "attach": 1.0,
    "state": 1.0,
    "reboot": 1.0,
    "prices": 1.0,
    "logs": 1.0,
    "charges": 1.0,
    "user": 0.5,
}
PATIENCE_S = 60.0  # how long a call is repeated
FIRST_PATIENCE_S = 20.0  # the same, before vast.ai has answered once
TRIES = 3  # at least, however long each took; before vast.ai has answered once, 2
LOG_PATIENCE_S = 10.0  # for a container's log
PAGE = 25  # rows of a list's page
MAX_PAGES = 400  # of one list: more is a list that does not end
MAX_LOG_BYTES = 4 << 20
# (host, path) where vast.ai stores a container's log: its own bucket, not all that Amazon hosts
LOG_PLACES = (("s3.amazonaws.com", "/vast.ai/"), ("vast.ai.s3.amazonaws.com", "/"))


class Vast:
    """vast.ai's API for one account. Methods raise MarketError; not for two threads (`twin`)."""

    def __init__(self, provider: Provider, clock: Clock) -> None:
        # The client respects the machine's proxy settings, and adds a slash to the address.
        self.provider = provider
        self.clock = clock
        self._client = http.Client(provider.api_key, provider.url.rstrip("/"), retry=1, timeout=30)
        # called with a message when an answer is slow
        self.tell: Callable[[str], object] = lambda text: None
        self._answered = False
        self._last_call: dict[str, float] = {}
        self._account = ""

    def twin(self) -> Vast:
        """A client of its own for another thread: same account and clock, no shared connection."""
        return Vast(self.provider, self.clock)

    # -- account -----------------------------------------------------------------------------------

    def credit_usd(self) -> float:
        """Prepaid dollars left. Raises Refused for a key that vast.ai does not know."""
        user = self._repeat("user", "GET", "/users/current")
        self._account = str(user.get("id") or "")
        try:
            return float(user.get("credit") or 0.0)
        except BAD_ROW as e:
            raise NoAnswer(f"vast.ai tells a credit that is no number: {user['credit']!r}") from e

    def account(self) -> str:
        """The account's id, asked for once. Raises NoAnswer where vast.ai tells none."""
        if not self._account:
            self.credit_usd()
        if not self._account:
            raise NoAnswer("vast.ai does not say whose account this is")
        return self._account

    # -- market ------------------------------------------------------------------------------------

    def search(
        self, query: dict[str, Any], *, interruptible: bool, disk_gib: float
    ) -> tuple[list[Offer], bool]:
        """(offers as the server filtered them, priced for `disk_gib`; whether there may be more).
        Rows that cannot be parsed are left out."""
        body: dict[str, Any] = {
            "verified": {"eq": True},
            "external": {"eq": False},
            "rentable": {"eq": True},
            "rented": {"eq": False},
        }
        body |= query | {
            "type": "bid" if interruptible else "on-demand",
            "allocated_storage": disk_gib,
            "limit": ROWS,
        }
        body.setdefault("order", [["dph_total", "asc"]])
        rows = self._repeat("search", "POST", "/bundles/", body).get("offers")
        return parse_offers(parse_offer, rows), isinstance(rows, list) and len(rows) >= ROWS

    # -- instances ---------------------------------------------------------------------------------

    def create(
        self,
        offer_id: int,
        *,
        image: str,
        disk_gib: float,
        label: str,
        env: dict[str, str],
        onstart: str,
        bid_usd_per_hour: float | None,
        login: str | None = None,
    ) -> int:
        """Rent once and return the instance id. Never repeated: what a failed create made is found
        by `label`. `login` is for a private image's registry, as docker login takes it.

        Raises OfferGone (taken; nothing exists), Refused (credit, arguments; nothing exists unless
        `.instance_id` is set), RateLimited (nothing exists), NoAnswer (anything may exist)."""
        body = build_create_instance_payload(
            image=image,
            disk=disk_gib,
            env=env,
            price=bid_usd_per_hour,
            label=label,
            onstart_cmd=onstart,
            ssh=True,
            direct=True,
            cancel_unavail=True,
            login=login,
        )
        reply = self._call("create", "PUT", f"/asks/{offer_id}/", body, timeout_s=60)
        if reply.get("success") is True and isinstance(reply.get("new_contract"), int):
            return int(reply["new_contract"])
        raise refusal(200, reply)

    def instances(self, wanted: Callable[[str], bool] = lambda label: True) -> list[Instance]:
        """Every instance of the account over all pages whose label is `wanted`. Raises NoAnswer for
        a row of these that cannot be parsed: an incomplete list proves nothing."""
        try:
            return [parse_instance(row) for row in self._rows() if wanted(label_of(row))]
        except BAD_ROW as e:
            raise NoAnswer(f"vast.ai listed an instance that cannot be read: {e}") from e

    def labels(self) -> list[tuple[int, str]]:
        """(id, label) of every instance of the account; nothing else of a row is parsed. Raises
        NoAnswer where a row has no id or the list no end."""
        try:
            return [(int(row["id"]), label_of(row)) for row in self._rows()]
        except BAD_ROW as e:
            raise NoAnswer(f"vast.ai listed an instance without an id: {e}") from e

    def _rows(self) -> Iterator[dict[str, Any]]:
        query: dict[str, Any] = {
            "select_filters": {},
            "order_by": [{"col": "id", "dir": "asc"}],
            "limit": PAGE,
        }
        tokens: set[str] = set()
        for _ in range(MAX_PAGES):
            page = self._repeat("list", "GET", "/api/v1/instances/", query=query, has=validate_list)
            yield from page["instances"]
            token = page.get("next_token")
            if not token:
                return
            if str(token) in tokens:
                break
            tokens.add(str(token))
            query["after_token"] = token
        raise NoAnswer(f"vast.ai's list of instances does not end: {len(tokens)} pages were read")

    def instance(self, instance_id: int) -> Instance | None:
        """One instance; None when it does not exist (or is not visible yet)."""
        try:
            reply = self._repeat("show", "GET", f"/instances/{instance_id}/", query={"owner": "me"})
        except Refused as e:
            if is_gone(e):
                return None
            raise
        row = reply.get("instances")
        if not isinstance(row, dict):
            return None
        try:
            return parse_instance(row)
        except BAD_ROW as e:
            raise NoAnswer(f"vast.ai shows an instance that cannot be read: {e}") from e

    def destroy(self, instance_id: int) -> None:
        """Send one DELETE; an instance that does not exist is a success. Only the list proves that
        it is gone."""
        try:
            self._call("destroy", "DELETE", f"/instances/{instance_id}/", {})
        except Refused as e:
            if not is_gone(e):
                raise

    def set_running(self, instance_id: int, running: bool) -> None:
        """Start a stopped instance, or stop one; its disk stays. Raises Refused, with the code
        "resources_unavailable" where somebody else has its GPUs: it then waits for them."""
        state = "running" if running else "stopped"
        reply = self._repeat("state", "PUT", f"/instances/{instance_id}/", {"state": state})
        if reply.get("success") is False:
            queued = "resources" in message_of(reply) or "queued" in message_of(reply)
            code = "resources_unavailable" if queued else code_of(reply)
            raise Refused(f"vast.ai does not set it {state}: {message_of(reply)}", code=code)

    def attach_key(self, instance_id: int, public_key: str) -> None:
        self._repeat("attach", "POST", f"/instances/{instance_id}/ssh/", {"ssh_key": public_key})

    def price_increases(self, instance_id: int) -> list[tuple[int, float]]:
        """(number, $/h of the GPUs) of each price that the host asks of this instance and nobody
        has answered; nothing where vast.ai does not know the question."""
        try:
            reply = self._repeat("prices", "GET", "/instances/pending-price-increases/")
            rows = reply.get("pending_price_increases") or []
            mine = [row for row in rows if row["contract_id"] == instance_id]
            return [
                (int(row["pending_price_increase_id"]), float(row["new_gpu_costpersec"]) * 3600)
                for row in mine
            ]
        except (Refused, *BAD_ROW):
            return []

    def reboot(self, instance_id: int) -> None:
        self._repeat("reboot", "PUT", f"/instances/reboot/{instance_id}/", {})

    def container_log(self, instance_id: int, lines: int = 200) -> str:
        """The last `lines` of the container's log, or "" when vast.ai does not deliver it in
        LOG_PATIENCE_S. It is deleted with the instance."""
        reply = self._call(
            "logs", "PUT", f"/instances/request_logs/{instance_id}/", {"tail": str(lines)}
        )
        url = str(reply.get("result_url"))
        self._validate_log_url(url)

        def delivered() -> str | None:
            try:
                with requests.get(url, timeout=10, allow_redirects=False, stream=True) as answer:
                    if answer.status_code != 200:
                        return None
                    data = http.read(answer.raw, MAX_LOG_BYTES, whole=False)
            except requests.RequestException:
                return None
            return data.decode("utf-8", "replace")

        return until(delivered, every_s=0.5, timeout_s=LOG_PATIENCE_S, clock=self.clock) or ""

    def _validate_log_url(self, url: str) -> None:
        """Raises NoAnswer for an address that is neither vast.ai's nor this API's own."""
        try:
            there, here = urlsplit(url), urlsplit(self.provider.url)
            host, port = there.hostname or "", there.port
        except ValueError as e:
            raise NoAnswer(f"the log is said to lie at {url[:200]!r}, which is no address") from e
        own = (there.scheme, there.netloc) == (here.scheme, here.netloc)
        theirs = f".{host}".endswith(VAST_AI) or any(
            host == name and there.path.startswith(path) and "/.." not in there.path
            for name, path in LOG_PLACES
        )
        safe = there.scheme == "https" and port in (None, 443) and "@" not in there.netloc
        if not own and not (safe and theirs):
            raise NoAnswer(f"the log is said to lie at {url[:200]!r}, which is not vast.ai's")

    def charges(self, instance_id: int, since_unix_s: float) -> list[Charge]:
        """What vast.ai charged for one instance that was created after `since_unix_s`. The real
        service can be hours late."""
        filters = {
            "day": {"gte": int(since_unix_s) - 86400, "lte": int(self.clock.now()) + 86400},
            "type": {"in": ["instance"]},
        }
        query: dict[str, Any] = {
            "select_filters": filters,
            "format": "tree",
            "latest_first": True,
            "limit": 100,
        }
        found: list[Charge] = []
        source = f"instance-{instance_id}"
        for _ in range(MAX_PAGES):
            page = self._repeat("charges", "GET", "/charges/", query=query)
            rows = page.get("results") or []
            try:
                for row in rows:
                    if row.get("source") == source:
                        found += [parse_charge(item) for item in row.get("items") or []]
                # the latest came first
                older = not rows or float(rows[-1].get("start") or 0) < since_unix_s
            except BAD_ROW as e:
                raise NoAnswer(f"vast.ai's bill has a line that cannot be read: {e}") from e
            if older or not page.get("next_token"):
                return found
            query["after_token"] = page["next_token"]
        raise NoAnswer(f"vast.ai's bill does not end: {MAX_PAGES} pages were read")

    # -- the wire ----------------------------------------------------------------------------------

    def _repeat(
        self,
        kind: str,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        has: Callable[[dict[str, Any]], object] = lambda reply: None,
    ) -> dict[str, Any]:
        """A call that is safe to make twice: it is repeated on 429, without an answer, and where
        `has` raises NoAnswer for the reply, for PATIENCE_S; for FIRST_PATIENCE_S where vast.ai has
        not answered once, because then the address or the network is wrong."""
        failed: list[MarketError] = []
        patience_s, tries = PATIENCE_S, TRIES
        if not self._answered:
            patience_s, tries = FIRST_PATIENCE_S, min(2, TRIES)

        def called() -> dict[str, Any] | None:
            try:
                reply = self._call(kind, method, path, body, query)
                has(reply)
                return reply
            except (RateLimited, NoAnswer) as e:
                if e.code == QUOTA:  # the day's, not the minute's: asked again it is the same
                    raise
                if not failed:
                    self.tell(f"{e}; asked again for {patience_s:.0f} s")
                failed.append(e)
                return None

        every_s = 2.0 * INTERVAL_S[kind]
        reply = until(called, every_s=every_s, timeout_s=patience_s, clock=self.clock, tries=tries)
        if reply is None:
            raise failed[-1]
        return reply

    def _call(
        self,
        kind: str,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        timeout_s: float = 30,
    ) -> dict[str, Any]:
        self._wait_for_turn(kind)
        verb = getattr(self._client, method.lower())
        what = f"{method} {path}"
        try:
            reply = verb(path, query_args=query, json_data=body, timeout=timeout_s)
        except (requests.RequestException, ValueError, RecursionError) as e:  # its own look at it
            raise NoAnswer(f"{what}: no answer from {self.provider.url}: {reason_of(e)}") from e
        try:
            content = json.loads(reply.content) if reply.content else {}
        except (ValueError, RecursionError):  # no JSON, or of endless digits or brackets
            content = {"msg": reply.content[:200].decode("utf-8", "replace").strip()}
            if reply.ok or reply.status_code == 403:  # a page of a proxy or firewall
                raise NoAnswer(
                    f"{what}: vast.ai answered {reply.status_code}, but not in JSON: "
                    f"{content['msg']}"
                ) from None
        self._answered = True
        if reply.status_code == 429:
            raise rate_limited(what, content)
        if reply.status_code == 403 and not code_of(content):  # a firewall between us and vast.ai
            raise NoAnswer(f"{what}: 403 in words that are not vast.ai's: {message_of(content)}")
        if reply.status_code >= 500 and reply.status_code != 501:
            raise NoAnswer(f"{what}: vast.ai answered {reply.status_code}: {message_of(content)}")
        if not reply.ok:
            raise refusal(reply.status_code, content, creating=kind == "create")
        return content if isinstance(content, dict) else {"items": content}

    def _wait_for_turn(self, kind: str) -> None:
        waited_s = (self.clock.steady() - self._last_call.get(kind, -1e9)) / self.clock.pace
        if 0 <= waited_s < INTERVAL_S[kind]:
            self.clock.sleep(INTERVAL_S[kind] - waited_s)
        self._last_call[kind] = self.clock.steady()
