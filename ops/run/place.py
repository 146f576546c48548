"""Where a run was rented: the API's address and the account. A client of another account or
address, or of the emulator, never touches the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ops.errors import Elsewhere, JournalError
from ops.market.client import Vast
from ops.market.provider import is_loopback
from ops.run import journal
from ops.run.journal import Line

KIND = "place"  # the journal's line, written before the first `renting`
_FIRST_LINES = 8  # of a damaged journal, in which the place is looked for


@dataclass(frozen=True)
class Place:
    """`url` is the API's address, `account` the account's id by /users/current."""

    url: str
    account: str

    def __str__(self) -> str:
        kind = "the emulator at " if is_loopback(self.url) else ""
        return f"{kind}{self.url}, account {self.account}"

    def same_as(self, other: Place) -> bool:
        """Whether both are one place. An emulator that is started again has another port, but the
        same account."""
        emulators = is_loopback(self.url) and is_loopback(other.url)
        return self.account == other.account and (emulators or self.url == other.url)


def here(vast: Vast) -> Place:
    """The place of this client. Raises MarketError when vast.ai does not say whose account it
    is."""
    return Place(vast.provider.url.rstrip("/"), vast.account())


def remembered(lines: Iterable[Line]) -> Place | None:
    """The place in a journal; None for a run that rented nothing yet, or that milktea 0.1 began."""
    line = journal.last(list(lines), KIND)
    if line is None:
        return None
    if "url" not in line or "account" not in line:
        raise JournalError(
            f"line {line.n + 1} of the journal says that something was rented, not where",
            money="a box of this run may be billing",
            hint="`milktea reap` destroys by label what the account of VAST_API_KEY still has",
        )
    return Place(str(line["url"]), str(line["account"]))


def of_folder(folder: Path) -> Place | None:
    """The place in a journal that may be damaged, by its first lines; None where they have none."""
    try:
        with open(folder / journal.FILE, "rb") as file:
            heads = [file.readline(1 << 20) for _ in range(_FIRST_LINES)]
    except OSError:
        return None
    for text in heads:
        try:
            row = json.loads(text)
            if row["kind"] == KIND:
                return Place(str(row["url"]), str(row["account"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def validate_same(run_id: str, place: Place | None, vast: Vast) -> None:
    """Raises Elsewhere, naming both places, when the run was rented at another one; MarketError
    when vast.ai does not say whose account this is. A run without a place (None) passes."""
    if place is None:
        return
    this = here(vast)
    if not place.same_as(this):
        raise Elsewhere(
            f"{run_id} was rented at {place}; this command speaks to {this}: nothing was touched",
            money=Elsewhere.money,
        )
