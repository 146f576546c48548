"""Where a run was rented: the provider's address and the account. Another account, another address
or the emulator never touches it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ops.errors import Elsewhere
from ops.market.client import Vast, is_loopback
from ops.run import journal
from ops.run.journal import Line

KIND = "place"  # of the journal's line, written before the first `renting`
_FIRST_LINES = 8  # of a journal, among which the place is looked for where it is damaged


@dataclass(frozen=True)
class Place:
    """`url` of the API, `account` as /users/current tells its id."""

    url: str
    account: str

    def __str__(self) -> str:
        kind = "the emulator at " if is_loopback(self.url) else ""
        return f"{kind}{self.url}, account {self.account}"

    def same_as(self, other: Place) -> bool:
        """An emulator that is started again has another port, and the same account."""
        emulators = is_loopback(self.url) and is_loopback(other.url)
        return self.account == other.account and (emulators or self.url == other.url)


def here(vast: Vast) -> Place:
    """The place that `vast` speaks to. Raises MarketError when the account is not told."""
    return Place(vast.provider.url.rstrip("/"), vast.account())


def remembered(lines: Iterable[Line]) -> Place | None:
    """None for a run that rented nothing yet, and for one that milktea 0.1 began."""
    line = journal.last(list(lines), KIND)
    return None if line is None else Place(str(line["url"]), str(line["account"]))


def of_folder(folder: Path) -> Place | None:
    """The place in a journal that may be damaged: what its first readable lines say."""
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
    when the account cannot be asked for. A run without a place is taken as ever."""
    if place is None:
        return
    this = here(vast)
    if not place.same_as(this):
        raise Elsewhere(
            f"{run_id} was rented at {place}; this command speaks to {this}: nothing was touched",
            money=Elsewhere.money,
        )
