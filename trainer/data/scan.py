"""Rows of JSON arrays and JSON lines, one by one, each with its place in the file.

A file may be of any size: of JSON lines one line is held, of an array a stretch of text that ends
soon after the row that is read. A row is ``(place, value)``; objects come as tuples of pairs, so
that a key given twice can be seen, arrays as lists. Pure but for reading the file; stdlib only.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK = 1 << 20  # bytes of an array that are read at a time
MAX_ROW_SIZE = 100_000_000  # bytes of a line, characters of a row in an array
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of such bytes
_TRAILING = "a comma before a closing bracket", "remove the comma"
_ENDS = "the {whole} ends inside a text that has no closing quotation mark"
_LINE = "JSON lines want one whole object a line and nothing else"
_REASONS = [  # start of the message, pattern of the text there, reason and fix in words
    ("Unterminated", "", _ENDS, "{cut}"),
    ("Invalid \\u", r"u[0-9a-fA-F]{0,3}\Z", _ENDS, "{cut}"),
    ("", r"(t|tr|tru|f|fa|fal|fals|n|nu|nul)?\Z", "the {whole} ends too early", "{cut}"),
    ("Invalid control", r"[\r\n]", "a string is not closed on its line", 'close it with "'),
    ("Invalid control", "", "a raw control character {at[0]!r} in a string", "write it as \\u00XX"),
    ("Invalid \\", "", "{escape!r} is not an escape that JSON knows", "double the backslash: \\\\"),
    ("Too deep", "", "brackets are nested too deep", "flatten the row"),
    ("Too long", "", f"the row is longer than {MAX_ROW_SIZE:,} characters", "split the row"),
    ("Array ended", "", "something more after the array's end", "remove it, or use JSON lines"),
    ("Row ended", ",", "a comma after the row", _LINE),
    ("Row ended", "", "something more ({at!r}) after the row", _LINE),
    ("Illegal trailing comma", "", *_TRAILING),
    ("No comma", "", "a comma is missing between two rows", "add it after the row before"),
    (
        "Expecting ',' delimiter",
        "",
        "a comma or closing bracket is missing before {at[0]!r}",
        'add the comma, or escape a quotation mark inside the text as \\"',
    ),
    ("Expecting ':' delimiter", "", "a colon is missing after a field's name", 'add ":"'),
    ("", "'", "single quotation marks", 'JSON wants double ones: "'),
    ("", "//|/[*]|#", "a comment", "JSON has none: remove it"),
    ("Expecting prop", "", "a field's name needs double quotation marks, found {at[0]!r}", 'add "'),
    ("", ",", "nothing stands before this comma", "remove the comma, or write what is missing"),
    ("", "None", "None is not JSON", "write null, or a text in quotation marks"),
    ("", "True|False", "True and False are not JSON", "write true, false, or a text in quotes"),
    ("", "", "a value is missing or is not JSON, found {at[0]!r}", "write a text in double quotes"),
]


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # int() refuses 4,301 digits


_decoder = json.JSONDecoder(object_pairs_hook=tuple, parse_int=_integer)


def _decode(text: str, at: int) -> tuple[Any, int]:
    """(the value that begins at `at`, its end); all that can go wrong is a JSONDecodeError."""
    try:
        return _decoder.raw_decode(text, at)
    except RecursionError:
        raise json.JSONDecodeError("Too deep", text, at) from None


@dataclass(frozen=True)
class Broken:
    """Text that is not a row. `line` and `column` count from 1; the column counts characters."""

    line: int
    column: int
    reason: str
    fix: str
    ends: bool = False  # what follows in the file cannot be read


@dataclass
class Location:
    """Where a row is: its text begins at `start` of `text`, on line `line` of the file; `before`
    characters stand in front of `text` on its first line. Good until the next row is asked for.
    `found` keeps the offsets that were looked for."""

    text: str
    start: int
    line: int
    before: int = 0
    found: dict[tuple[str | int, ...], int | None] = field(default_factory=dict, repr=False)

    def at(self, offset: int) -> tuple[int, int]:
        """(line, column) of an offset into `text`, which is not before `start`."""
        newline = self.text.rfind("\n", 0, offset)
        column = offset - newline if newline >= 0 else self.before + offset + 1
        return self.line + self.text.count("\n", self.start, offset), column

    def locate(self, path: tuple[str | int, ...]) -> tuple[int, int]:
        """(line, column) of the value at `path`, or of the nearest thing around it that exists."""
        at = self.start
        for depth, step in enumerate(path, 1):
            around = path[:depth]
            if around not in self.found:  # defects of one row stand side by side
                self.found[around] = _step(self.text, at, step)
            if (found := self.found[around]) is None:
                break
            at = found
        return self.at(at)

    def broken(self, error: json.JSONDecodeError, whole: str) -> Broken:
        """`error` in words. `whole` is what ends where `text` does: a line or a file."""
        at = self.text[error.pos : error.pos + 12]
        before = self.text[self.start : error.pos].rstrip()
        if before.endswith(",") and at.startswith(("]", "}")):
            return Broken(*self.at(self.start + len(before) - 1), *_TRAILING)
        cut = _LINE if whole == "line" else "it is cut short: copy it again, or complete it"
        escape = at[:2] if at.startswith("\\") else "\\" + at[:5]
        reason, fix = next(
            (reason.format(whole=whole, at=at, escape=escape), fix.format(cut=cut))
            for message, pattern, reason, fix in _REASONS
            if error.msg.startswith(message) and re.match(pattern, at)
        )
        return Broken(*self.at(error.pos), reason, fix)


def _step(text: str, at: int, step: str | int) -> int | None:
    """Offset of one item of the sound value that begins at `at`; of a key given twice, the last."""
    closing = {"{": "}", "[": "]"}.get(text[at])
    at, index, found = _skip(text, at + 1), 0, None
    while closing and text[at] != closing:
        name: str | int = index
        if closing == "}":
            name, at = _decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        if name == step:
            found = at
            if closing == "]":
                break
        at = _skip(text, _decode(text, at)[1])
        at, index = _skip(text, at + 1) if text[at] == "," else at, index + 1
    return found


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _not_utf8(line: int, column: int, byte: int, offset: int) -> Broken:
    """`offset` is where the byte is in the file, counted from 0."""
    reason = f"byte 0x{byte:02x} (at offset {offset} of the file) is not UTF-8"
    fix = "convert the file: iconv -f GB18030 -t UTF-8 (or the encoding it has)"
    return Broken(line, column, reason, fix)


def open_data(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked where gzip packed it, whatever it is called."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if packed else open(path, "rb")


def text_lines(path: Path, keep_ends: bool = False) -> Iterator[tuple[int, str] | Broken]:
    """(number, line without its end, unless `keep_ends`) of each line of a file in UTF-8."""
    number, begin, end = 0, 0, 0
    with open_data(path) as file:
        while raw := file.readline(MAX_ROW_SIZE):
            number, begin, end = number + 1, end, end + len(raw)
            if len(raw) == MAX_ROW_SIZE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_SIZE)
                    end += len(raw)
                yield Broken(
                    number, 1, f"the line is longer than {MAX_ROW_SIZE:,} bytes", "split it"
                )
                continue
            try:
                yield number, (raw if keep_ends else raw.rstrip(b"\r\n")).decode("utf-8")
            except UnicodeDecodeError as error:
                at = error.start
                yield _not_utf8(number, len(raw[:at].decode("utf-8")) + 1, raw[at], begin + at)


def scan_lines(path: Path) -> Iterator[tuple[Location, Any] | Broken]:
    """Rows of JSON lines. Blank lines are passed over; after a broken line the next is read."""
    first = True
    for item in text_lines(path):
        if isinstance(item, Broken):
            yield item
            continue
        number, line = item
        place = Location(line, len(line) - len(line.lstrip(" \t\r\ufeff")), number)
        if place.start == len(line):
            continue
        if first and line.strip(" \t\r\ufeff") == "{":
            fix = "write each row on one line, or all rows as an array: [ ... ]"
            yield Broken(
                *place.at(place.start), "the first row goes over several lines", fix, ends=True
            )
            return
        first = False
        try:
            value, end = _decode(line, place.start)
            if (end := _skip(line, end)) < len(line):
                raise json.JSONDecodeError("Row ended", line, end)
        except json.JSONDecodeError as error:
            yield place.broken(error, "line")
        else:
            yield place, value


def scan_array(path: Path) -> Iterator[tuple[Location, Any] | Broken]:
    """Rows of a JSON array, which may be the value of one field of an object. The first error of
    syntax ends it."""
    with open_data(path) as file:
        window = _Window(file)
        last_line = 0  # bytes that are not UTF-8 are reported once a line
        try:
            for value, end in _rows(window):
                bad = window.not_utf8(end)
                if not bad or bad.line > last_line:
                    yield bad or (window, value)
                last_line = bad.line if bad else last_line
        except json.JSONDecodeError as error:
            bad = window.not_utf8(error.pos + 1) or window.broken(error, "file")
            yield replace(bad, ends=True)


def _rows(window: _Window) -> Iterator[tuple[Any, int]]:
    """(value, its end) of each row, which begins where the window does. Raises JSONDecodeError."""
    wrapped = window.text.lstrip(" \t\r\n\ufeff").startswith("{")
    window.move(window.text.index("["))
    at = window.skip(1)
    while not window.text.startswith("]", at):
        window.move(at)
        value, end = window.value()
        yield value, end
        window.move(window.skip(end - window.start))
        if window.text.startswith("]", window.start):
            at = window.start
            break
        if not window.text.startswith(",", window.start):
            raise json.JSONDecodeError("No comma", window.text, window.start)
        at = window.skip(1)
        if window.text.startswith("]", at):
            raise json.JSONDecodeError("Illegal trailing comma", window.text, window.start)
    window.move(at)
    at = window.skip(1)
    if wrapped and window.text.startswith("}", at):
        window.move(at)
        at = window.skip(1)
    if at < len(window.text):
        raise json.JSONDecodeError("Array ended", window.text, at)


class _Window(Location):
    """A stretch of an array's text from the row at `start` on; it grows and loses what is read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__("", 0, 1)
        self._file, self._has_bad_bytes, self._ended = file, False, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._refill()

    def move(self, at: int) -> None:
        """Makes the offset `at` the start."""
        self.line += self.text.count("\n", self.start, at)
        self.start = at
        self.found.clear()

    def skip(self, after: int) -> int:
        """Offset of the first character that is no blank, from `after` the start on, or the end."""
        while (at := _skip(self.text, self.start + after)) == len(self.text) and not self._ended:
            self._refill()
        return at

    def value(self) -> tuple[Any, int]:
        """(value, its end) of what begins at the start; reads on where the text is cut."""
        while True:
            try:
                value, end = _decode(self.text, self.start)
                if end < len(self.text) or self._ended:  # else a number may go on
                    return value, end
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if self._ended or not cut:
                    raise
            self._refill()

    def _refill(self) -> None:
        """Drops what is before the start and reads on: twice as much where a row is long."""
        newline = self.text.rfind("\n", 0, self.start)
        self.before = self.before + self.start if newline < 0 else self.start - newline - 1
        self.text, self.start = self.text[self.start :], 0
        self.found.clear()
        room = MAX_ROW_SIZE - len(self.text)
        if room <= 0:
            raise json.JSONDecodeError("Too long", self.text, 0)
        raw = self._file.read(min(max(CHUNK, len(self.text)), room))
        self._ended = not raw
        self.text += self._decoder.decode(raw, self._ended)
        self._has_bad_bytes = not self.text.isascii() and bool(_NOT_UTF8.search(self.text))

    def not_utf8(self, end: int) -> Broken | None:
        """The first byte from the start to `end` that is not UTF-8."""
        found = self._has_bad_bytes and _NOT_UTF8.search(self.text, self.start, end)
        if not found:
            return None
        at = found.start()
        unread = len(self._decoder.getstate()[0])
        rest = len(self.text[at:].encode("utf-8", "surrogateescape"))
        return _not_utf8(*self.at(at), ord(found[0]) - 0xDC00, self._file.tell() - unread - rest)
