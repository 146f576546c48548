"""Text from elsewhere, made plain before it reaches a terminal: what a box, the API or a data set
says may hold escape sequences that retitle, clear or forge the screen. And times in words."""

from __future__ import annotations

import json
import re
from typing import Any

from trainer.data.words import number_of as number_of

# C0 but tab and newline, DEL, C1; what turns or hides the direction of text; lone surrogates.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def plain(text: str) -> str:
    r"""`text` with every such character written out, as ``\x1b``. Newlines and tabs stay; a
    carriage return before a newline is dropped."""
    return _ODD.sub(_written_out, text.replace("\r\n", "\n"))


def json_line(row: Any) -> str:
    """`row` as one line of JSON that any program reads back as it is, and any terminal shows
    without being steered. What is no JSON is written as text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return _ODD.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def span(seconds: float) -> str:
    """A length of time as people say it: 119 s, 89 min, 1.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _written_out(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
