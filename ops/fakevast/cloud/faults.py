"""What goes wrong, as data. A fault waits at a place, counts the events there that match it, and
fires on the n-th.

Places are the API's route names (`create`, `destroy`, `show`, `list`, `search`, ...; `*` is any of
them) and the events in a box's life: `boot` (a start begins), `running` (it came up), `ssh` (a
connection arrives), `exec` (a command begins).

    {"where": "create", "what": "lost_reply"}                              the next create commits,
    then the line is cut {"where": "destroy", "what": "reply", "status": 429, "on_call": 2, "times":
    3} {"where": "boot", "what": "stuck_loading", "machine_id": 21004}        on the next boot of
    that machine {"where": "ssh", "what": "cut", "every_bytes": 1000000, "times": null} for ever
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

API_FAULTS = {
    "lost_reply",  # commits, then cuts the connection
    "lost_request",  # cuts the connection before anything happened
    "late",  # commits, answers after delay_s
    "429_text",
    "429_json",
    "502_before",
    "502_after",
    "success_false",
    "no_such_ask",  # status: 404, 410 or 400
    "insufficient_credit",
    "spend_rate_limit",
    "reply",  # status, body (object or text), content_type; commit: true commits first
    "list_lag",  # create: the new instance is absent from `in` (list, show) for `reads` reads
    "wrong_fields",  # create: `fields` replace those of the instance's record
    "still_listed",  # destroy: gone, but listed for `reads` more reads
    "ignored",  # destroy: answered success, nothing done; the next DELETE works
    # destroy: answered success, unlisted for `reads` reads, then back, billing all the while
    "resurrect",
}
BOX_FAULTS = {
    "boot": {
        "stuck_loading",
        "pull_error",
        "oci_error",
        "cuda_mismatch",
        "no_space",
        "exited",
        "offline",
        "unknown",
        "tunnel_stuck",
        "wrong_gpu",
        "disk_full",
        "slow",
    },
    "running": {"exited", "offline", "unknown", "outbid", "host_death"},
    "ssh": {"reset", "denied", "new_host_key", "cut", "host_death", "hang"},
    "exec": {"host_death", "cut", "fail"},
}
_OWN = {"where", "what", "on_call", "times", "label", "id", "machine_id", "ask_id"}


@dataclass
class Fault:
    """Fires on matching calls number on_call .. on_call + times - 1 (times None: for ever). `label`
    may be a glob."""

    where: str
    what: str
    on_call: int = 1
    times: int | None = 1
    label: str | None = None
    id: int | None = None
    machine_id: int | None = None
    ask_id: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    seen: int = 0

    def fires(self, where: str, context: dict[str, Any]) -> bool:
        """Counts this call if it matches; says whether this is one of those to spoil."""
        if self.where != where and not (self.where == "*" and where not in BOX_FAULTS):
            return False
        if self.label is not None and not fnmatch.fnmatchcase(
            str(context.get("label") or ""), self.label
        ):
            return False
        if any(
            getattr(self, name) not in (None, context.get(name))
            for name in ("id", "machine_id", "ask_id")
        ):
            return False
        self.seen += 1
        return self.seen >= self.on_call and (
            self.times is None or self.seen < self.on_call + self.times
        )


class Faults:
    """The list of them; `add` takes the data as a dict or as keywords."""

    def __init__(self) -> None:
        self.planned: list[Fault] = []
        self.on_event: list[Callable[[str, dict[str, Any]], None]] = []  # before it is spoiled
        self.fired: list[tuple[str, str]] = []

    def add(self, spec: dict[str, Any] | None = None, **more: Any) -> Fault:
        data = {**(spec or {}), **more}
        known = BOX_FAULTS.get(data.get("where", ""), API_FAULTS)
        if data.get("what") not in known:
            raise ValueError(
                f"fault {data!r}: `what` at {data.get('where')!r} is one of "
                f"{', '.join(sorted(known))}"
            )
        own = {key: value for key, value in data.items() if key in _OWN}
        fault = Fault(**own, args={key: value for key, value in data.items() if key not in _OWN})
        self.planned.append(fault)
        return fault

    def take(self, where: str, **context: Any) -> Fault | None:
        """The fault that spoils this event, if any. Every planned fault that matches counts it."""
        for tell in self.on_event:
            tell(where, context)
        hits = [fault for fault in self.planned if fault.fires(where, context)]
        if not hits:
            return None
        self.fired.append((where, hits[0].what))
        return hits[0]

    def clear(self) -> None:
        self.planned.clear()
