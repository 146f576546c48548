"""Pure: many mistakes told in few lines. Equal ones are counted, their first few shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHOWN = 10  # of one kind
KINDS = 20  # of which lines are shown
_PLACE = re.compile(r"^(?P<file>.*?):\d+(?::\d+)?: (?P<what>.*)$", re.DOTALL)
_OWN = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")  # what differs between equal mistakes


def counted(lines: Iterable[str]) -> list[str]:
    """The lines, of each kind the first SHOWN and how many more; a kind is one file and one
    mistake, whatever number or word it is about."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        placed = _PLACE.match(line)
        file, what = (placed["file"], placed["what"]) if placed else ("", line)
        kinds.setdefault((file, _OWN.sub("#", what)), []).append(line)
    told: list[str] = []
    for (file, _), same in list(kinds.items())[:KINDS]:
        told += same[:SHOWN]
        if len(same) > SHOWN:
            where = f" in {file}" if file else ""
            told.append(f"... and {len(same) - SHOWN:,} more of this kind{where}")
    left = sum(len(same) for same in list(kinds.values())[KINDS:])
    if left:
        told.append(f"... and {left:,} more of {len(kinds) - KINDS:,} other kinds")
    return told
