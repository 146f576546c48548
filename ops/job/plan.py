"""What is to be done with one job: all that a later client needs to go on. It is the journal's
first line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ops.box.transfer import PushFile
from ops.market.cost import Workload
from ops.market.ranking import Needs

# what the boxes of milktea 0.1 do, whose plans do not tell
_NO_SILENCE: dict[str, Any] = {"when_silent": "destroy"}


class Row(Protocol):
    """What can be read by name: a journal's line, or a dict."""

    def __getitem__(self, key: str, /) -> Any: ...
    def __contains__(self, key: object, /) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """What is to be done, decided before a cent is spent. All of it goes into the journal's first
    line."""

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
    estimated: bool = False  # tokens from characters: good for a price, never rented by
    when_silent: str = "finish"  # or destroy
    hold_s: float | None = None  # for which an ended training is kept without a client

    @property
    def env(self) -> list[str]:
        """Names of the variables that go to the box at launch."""
        return list(self.wire_job.get("environment", []))

    def to_line(self) -> dict[str, Any]:
        row = asdict(self)
        del row["estimated"]
        row["pushes"] = [
            {"local": str(p.local), "remote": p.remote, "sha256": p.sha256} for p in self.pushes
        ]
        return row

    @classmethod
    def from_line(cls, line: Row) -> Plan:
        row = _NO_SILENCE | {f.name: line[f.name] for f in fields(cls) if f.name in line}
        row["pushes"] = [
            PushFile(Path(p["local"]), p["remote"], p["sha256"]) for p in row["pushes"]
        ]
        return cls(
            **row | {"needs": Needs(**row["needs"]), "workload": Workload(**row["workload"])}
        )
