"""Pure: shorten a long list of mistakes. Equal ones are counted, and the first few shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHOWN = 10  # lines of one kind
KINDS = 20  # kinds of which lines are shown
_PLACE = re.compile(r"^(?P<file>.*?):\d+(?::\d+)?: (?P<what>.*)$", re.DOTALL)
_DETAIL = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")  # what differs between equal mistakes


def grouped(lines: Iterable[str]) -> list[str]:
    """The first SHOWN lines of each kind, and how many more there are. Lines are of one kind when
    they name the same file and differ only in numbers and quoted words."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        placed = _PLACE.match(line)
        file, what = (placed["file"], placed["what"]) if placed else ("", line)
        kinds.setdefault((file, _DETAIL.sub("#", what)), []).append(line)
    shown: list[str] = []
    for (file, _), same in list(kinds.items())[:KINDS]:
        shown += same[:SHOWN]
        if len(same) > SHOWN:
            where = f" in {file}" if file else ""
            shown.append(f"... and {len(same) - SHOWN:,} more of this kind{where}")
    hidden = sum(len(same) for same in list(kinds.values())[KINDS:])
    if hidden:
        shown.append(f"... and {hidden:,} more of {len(kinds) - KINDS:,} other kinds")
    return shown
