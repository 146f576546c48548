"""The plan of a run: everything that a later client needs to resume it. It is the journal's first
line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ops.box.transfer import PushFile
from ops.job.label import Label
from ops.market.ranking import Needs
from ops.market.workload import Workload

# what milktea 0.1 did; its plans do not say so
_DEFAULTS_OF_0_1: dict[str, Any] = {"when_silent": "destroy"}


class Keyed(Protocol):
    """Anything with values by name: a journal's line, or a dict."""

    def __getitem__(self, key: str, /) -> Any: ...
    def __contains__(self, key: object, /) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before anything is spent."""

    run_id: str
    image: str
    trainer: str  # push or image
    wire_job: dict[str, Any]
    pushes: list[PushFile]
    needs: Needs
    workload: Workload
    max_usd: float
    max_s: float
    stall_s: float
    out: str
    notes: list[str]
    image_login: str = ""  # the variable that holds a registry's USER:TOKEN
    estimated: bool = False  # tokens are estimated from characters: only for prices, never rented
    when_silent: str = "finish"  # or destroy
    hold_s: float | None = None  # how long an ended training waits for a client; None: no limit
    talk_s: float = 0.0  # for which the box serves a result, once it does
    evaluate: dict[str, Any] | None = None  # rows, new_tokens, seconds at most: on the box
    merged: bool = False  # the box merges the result, and the model comes home
    notify: dict[str, Any] | None = None  # the job's [notify]: who is told
    trains: bool = True  # else it is rented to talk to a result of another run
    user: str = ""  # who rents, as the label of its boxes says; "" in plans that are older

    @property
    def env(self) -> list[str]:
        """Names of the variables that go to the box at launch."""
        return list(self.wire_job.get("environment", []))

    @property
    def label(self) -> str:
        """Of its boxes on vast.ai."""
        return str(Label(self.run_id, self.user))

    def to_line(self) -> dict[str, Any]:
        """The data of the journal's first line."""
        row = asdict(self)
        del row["estimated"]
        row["pushes"] = [
            {"local": str(p.local), "remote": p.remote, "sha256": p.sha256} for p in self.pushes
        ]
        return row

    @classmethod
    def from_line(cls, line: Keyed) -> Plan:
        """The plan in a journal's first line, of this version or of 0.1."""
        row = _DEFAULTS_OF_0_1 | {f.name: line[f.name] for f in fields(cls) if f.name in line}
        row["pushes"] = [
            PushFile(Path(p["local"]), p["remote"], p["sha256"]) for p in row["pushes"]
        ]
        return cls(
            **row | {"needs": Needs(**row["needs"]), "workload": Workload(**row["workload"])}
        )
