"""JSON arrays and JSON lines, row by row, with positions: the C scanner of the standard library does the reading, and lines and columns are
worked out only where something is wrong. Files of any size: 16 MiB at a time. Pure but for reading the file; stdlib only.

A row is ``(place, value)``: objects come as tuples of pairs, so that a key given twice can be seen, arrays as lists.
After a broken row, reading goes on at the next thing that looks like a row's beginning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in the stubs; there since Python 2.6
from pathlib import Path
from typing import Any

BLOCK = 16 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")  # a comma between two rows
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)
_scan = _DECODER.scan_once  # type: ignore[attr-defined]
_ODD = (
    "\x00",
    "\ufffd",
    "\\u0000",
    "\\ufffd",
    "\\uFFFD",
    "\\ud",
    "\\uD",
)  # NUL, replacement character, surrogates: raw or escaped


@dataclass(frozen=True)
class Broken:
    """Text that is not JSON. `line` and `column` count from 1; the column counts characters."""

    line: int
    column: int
    reason: str
    fix: str


@dataclass
class Place:
    """Where a row is: its text begins at `start` of `text`, on line `line`. `before` is what comes in front of `text` on its first line,
    in characters. `odd` says that this stretch of text holds characters that want a closer look. It is good until the next row is asked for."""

    text: str
    start: int
    line: int
    before: int = 0
    odd: bool = False

    def at(self, offset: int) -> tuple[int, int]:
        """(line, column) of an offset into `text`, which is not before `start`."""
        newline = self.text.rfind("\n", 0, offset)
        column = offset - newline if newline >= 0 else self.before + offset + 1
        return self.line + self.text.count("\n", self.start, offset), column

    def locate(self, path: tuple[str | int, ...]) -> tuple[int, int]:
        """(line, column) of the value at `path` in this row, or of the nearest thing around it that exists."""
        return self.at(_locate(self.text, self.start, path))


@dataclass(frozen=True)
class End:
    """Where reading stopped: a byte offset, and how many lines and, on the last one, characters lie before it."""

    byte: int | None
    lines: int = 0
    characters: int = 0


def _is_odd(text: str) -> bool:
    return any(mark in text for mark in _ODD)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _locate(text: str, at: int, path: tuple[str | int, ...]) -> int:
    """Offset of the value at `path` under the value that begins at `at`. Of a key given twice, the last."""
    if not path or text[at] not in "{[":
        return at
    found, row, wanted, at, index = at, at, path[0], at + 1, 0
    inside = text[row] == "{"
    while True:
        at = _skip(text, at)
        if text[at] in "]}":
            return found
        name: str | int = index
        if inside:
            name, at = scanstring(text, at + 1, True)
            at = _skip(text, _skip(text, at) + 1)
        if name == wanted:
            found = _locate(text, at, path[1:])
        _, at = _scan(text, at)
        at = _skip(text, at)
        index += 1
        if text[at] == ",":
            at += 1


def _explain(error: json.JSONDecodeError, text: str) -> tuple[str, str]:
    """(reason, fix) in words for what the C scanner stumbled over."""
    found = text[error.pos : error.pos + 1]
    before = text[: error.pos].rstrip()[-1:]
    message = error.msg
    if message.startswith("Invalid control character"):
        if found in "\r\n":
            return "a string is not closed on its line", 'close it with ", or write a line break inside text as \\n'
        return f"a raw control character {found!r} inside a string", "write it as \\t or \\u00XX, or remove it"
    if message.startswith(("Invalid \\escape", "Invalid \\u")):
        return f"{text[error.pos : error.pos + 2]!r} is not an escape that JSON knows", "double the backslash: \\\\"
    if message.startswith("Unterminated string"):
        return "a string is never closed", 'close it with "'
    if message.startswith("Expecting ',' delimiter"):
        return (
            f"a comma or closing bracket is missing before {found!r}",
            'add the comma, or escape a quotation mark inside the text as \\"',
        )
    if message.startswith("Expecting ':' delimiter"):
        return "a colon is missing after a field's name", 'write "name": value'
    if message.startswith("Illegal trailing comma") or (before == "," and found in "]}"):
        return "a comma before a closing bracket", "remove the comma"
    if message.startswith("Expecting property name"):
        if found == "'":
            return "single quotation marks", 'JSON wants double ones: "'
        return f"a field's name must stand in double quotation marks, found {found!r}", 'write "name": value'
    if not found:
        return "the file ends inside a row", "the file is cut short: copy it again, or complete the row"
    if found == "'":
        return "single quotation marks", 'JSON wants double ones: "'
    for word, json_word in (("None", "null"), ("True", "true"), ("False", "false"), ("undefined", "null")):
        if text.startswith(word, error.pos):
            return f"{word} is not JSON", f"write {json_word}, or a text in quotation marks"
    if text.startswith(("//", "/*", "#"), error.pos):
        return "a comment", "JSON has none: remove it"
    return f"a value is missing or is not JSON, found {found!r}", "write a text in double quotation marks"


def _fault(place: Place, error: Exception, text: str) -> Broken:
    if isinstance(error, StopIteration):
        error = json.JSONDecodeError("Expecting value", text, error.value)
    assert isinstance(error, json.JSONDecodeError)
    reason, fix = _explain(error, text)
    offset = error.pos
    if error.msg.startswith("Illegal trailing comma") or (offset < len(text) and text[offset] in "]}" and text[:offset].rstrip()[-1:] == ","):
        offset = text.rindex(",", 0, offset + 1)
    return Broken(*place.at(offset), reason, fix)


# -- JSON lines -------------------------------------------------------------------------------------------------------------------


def scan_lines(path: Path, begin: int = 0, end: int | None = None, first_line: int = 1) -> Iterator[tuple[Place, Any] | Broken]:
    """Rows of a JSONL file between two byte offsets that are line starts. Blank lines are passed over."""
    number = first_line
    for block in _line_blocks(path, begin, end):
        text, faults = decode(block, number)
        yield from faults
        odd = _is_odd(text)
        for line in text.split("\n"):
            stripped = line.strip(" \t\r\ufeff")
            if stripped:
                place = Place(line, line.index(stripped[0]), number, 0, odd)
                yield _one(place, line)
            number += 1
        number -= text.endswith("\n")


def _one(place: Place, line: str) -> tuple[Place, Any] | Broken:
    try:
        value, after = _scan(line, place.start)
    except (json.JSONDecodeError, StopIteration) as error:
        return _fault(place, error, line)
    after = _skip(line, after)
    if after < len(line):
        extra = "a comma" if line[after] == "," else f"something more ({line[after : after + 12]!r})"
        return Broken(*place.at(after), f"{extra} after the row", "JSON lines want one object a line and nothing else")
    return place, value


def _line_blocks(path: Path, begin: int, end: int | None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(begin)
        left = (path.stat().st_size if end is None else end) - begin
        while left > 0:
            block = file.read(min(BLOCK, left))
            block += file.readline() if len(block) < left else b""
            if not block:
                return
            left -= len(block)
            yield block


def decode(block: bytes, first_line: int) -> tuple[str, list[Broken]]:
    """UTF-8 to text. Bytes that are not UTF-8 become U+FFFD; the first such line of a block of lines is told, once a line."""
    try:
        return block.decode("utf-8"), []
    except UnicodeDecodeError:
        pass
    faults = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8", "replace")) + 1
            faults.append(
                Broken(
                    number,
                    column,
                    f"byte 0x{line[error.start]:02x} is not UTF-8",
                    "convert the file: iconv -f GB18030 -t UTF-8 (or the encoding it has)",
                )
            )
    return block.decode("utf-8", "replace"), faults


# -- a JSON array -----------------------------------------------------------------------------------------------------------------


def scan_array(path: Path, begin: int = 0, until: int | None = None) -> Iterator[tuple[Place, Any] | Broken | End]:
    """Rows of a JSON array, from its '[' (begin 0) or from a row at byte `begin`; lines and columns count from there. The last item is an End:
    at `until` where a row begins exactly there; at None for the array's end, which is also sought when `until` falls inside a row."""
    reader = _Window(path, begin, until)
    yield from reader.faults()
    at = reader.skip(0)
    if begin == 0:
        if reader.text[at : at + 1] == "\ufeff":
            at = reader.skip(at + 1)
        at += 1  # the bracket, which the caller has seen
    after_row = False
    while True:
        reader.trim(reader.skip(at))
        at, text = reader.at, reader.text
        yield from reader.faults()
        if at >= len(text):
            if reader.until is None:
                yield Broken(
                    *reader.place(at).at(at),
                    "the file ends inside the array",
                    "the file is cut short: copy it again, or add the closing ]",
                )
            line, column = reader.place(at).at(at)
            yield End(reader.until, line - 1, column - 1)
            return
        if text[at] == "]":
            yield from _after_end(reader, at + 1)
            yield End(None)
            return
        if text[at] == ",":
            place = reader.place(at)
            following = reader.skip(at + 1)
            if not after_row or reader.text[following : following + 1] == "]":
                yield Broken(
                    *place.at(at),
                    "a comma with no row after it" if after_row else "a comma with no row before it",
                    "remove the comma",
                )
            at, after_row = following, False
            continue
        if after_row:
            yield Broken(*reader.place(at).at(at), "a comma is missing between two rows", "add it after the row before")
        place = reader.place(at)
        try:
            value, at = reader.value(at)
            place.text, after_row = reader.text, True  # the window may have grown
            yield place, value
            at = yield from reader.run(at)
        except (json.JSONDecodeError, StopIteration) as error:
            place.text, after_row = reader.text, False
            yield _fault(place, error, reader.text)
            at = reader.resume(at)
            if at == len(reader.text) and reader.until is None:  # broken to the end: told once
                yield End(None)
                return


def _after_end(reader: _Window, at: int) -> Iterator[Broken]:
    at = reader.skip(at)
    if at < len(reader.text):
        yield Broken(
            *reader.place(at).at(at),
            "something more after the array's end",
            "one array a file: remove what follows, or use JSON lines",
        )


class _Window:
    """A sliding stretch of a file as text. It ends at byte `until` unless a row goes on beyond, which sets `until` to None."""

    def __init__(self, path: Path, begin: int, until: int | None) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed when the window is dropped
        self._file.seek(begin)
        self._read_to, self._rest, self.until = begin, b"", until
        self._before = 0
        self._mark = (0, 1)  # an offset into text and its line: lines are counted once
        self._faults: list[Broken] = []
        self._first_key: str | None = None
        self.text, self.at, self._odd = "", 0, False
        self._grow()

    def faults(self) -> list[Broken]:
        taken, self._faults = self._faults, []
        return taken

    def _grow(self, beyond: bool = False) -> bool:
        if beyond and self._read_to == self.until:
            self.until = None
        block = self._file.read(BLOCK if self.until is None else min(BLOCK, self.until - self._read_to))
        self._read_to += len(block)
        last = not block
        block = self._rest + block
        cut = len(block) if last else _whole_characters(block)
        block, self._rest = block[:cut], block[cut:]
        text, faults = decode(block, self.line(len(self.text)))
        self._faults += faults
        self._odd = self._odd or _is_odd(text)
        self.text += text
        return bool(text)

    def line(self, at: int) -> int:
        offset, line = self._mark
        self._mark = (at, line + self.text.count("\n", offset, at)) if at >= offset else (at, line - self.text.count("\n", at, offset))
        return self._mark[1]

    def trim(self, at: int) -> None:
        """Drops what lies before `at` once that is most of a block; sets `self.at` to where `at` is now."""
        self.at = at
        if at > BLOCK // 2:
            self.line(at)
            newline = self.text.rfind("\n", 0, at)
            self._before = self._before + at if newline < 0 else at - newline - 1
            self.text, self.at, self._mark = self.text[at:], 0, (0, self._mark[1])
            self._odd = _is_odd(self.text)

    def skip(self, at: int) -> int:
        at = _skip(self.text, at)
        while at >= len(self.text) and self._grow():
            at = _skip(self.text, at)
        return at

    def place(self, at: int) -> Place:
        return Place(self.text, at, self.line(at), self._before, self._odd)

    def run(self, at: int) -> Generator[tuple[Place, Any], None, int]:
        """The plain case, fast: sound rows with a comma between them. Returns where it became less plain."""
        text, place = self.text, self.place(at)
        counted, line = self._mark
        while at < BLOCK // 2:
            comma = _BETWEEN.match(text, at)
            if comma is None:
                break
            start = comma.end()
            try:
                value, at = _scan(text, start)
            except (json.JSONDecodeError, StopIteration):
                break
            line += text.count("\n", counted, start)
            counted = place.start = start
            place.line = line
            yield place, value
        self._mark = (counted, line)
        return at

    def value(self, at: int) -> tuple[Any, int]:
        while True:
            try:
                found = _scan(self.text, at)
                break
            except (json.JSONDecodeError, StopIteration) as error:
                position = error.value if isinstance(error, StopIteration) else error.pos
                cut = position >= len(self.text) - 16 or (isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated"))
                if not (cut and self._grow(beyond=True)):
                    raise
        if self._first_key is None and type(found[0]) is tuple and found[0]:
            self._first_key = found[0][0][0]
        return found

    def resume(self, broken: int) -> int:
        """After a broken row: the offset of the next row, told by a brace and the field that rows begin with; else the closing bracket or the end."""
        first = json.dumps(self._first_key, ensure_ascii=False)[1:-1] if self._first_key else None
        key = re.escape(first) if first else r"(?:instruction|conversations|messages|prompt|text|system|id|input|output)"
        pattern = re.compile(r'\{\s*"' + key + r'"\s*:')
        while True:
            match = pattern.search(self.text, broken + 1)
            if match:
                return match.start()
            if not self._grow():
                tail = self.text.rstrip()
                return len(tail) - 1 if tail.endswith("]") else len(self.text)


def _whole_characters(block: bytes) -> int:
    """Length of `block` without a UTF-8 character that is cut at its end."""
    for back in range(1, min(4, len(block)) + 1):
        byte = block[-back]
        if byte & 0xC0 == 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(block) - back if width > back else len(block)
        if byte < 0x80:
            return len(block)
    return len(block)


def row_starts(path: Path, parts: int) -> list[int]:
    """Guesses at byte offsets of rows that cut an array into `parts` of about equal size, by a brace and the first row's first field, which
    cannot stand like that inside a JSON string. A guess is proven by the part before it ending exactly there."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = re.match(rb'[\xef\xbb\xbf\s]*\[\s*\{\s*("(?:[^"\\]|\\.)*")\s*:', file.read(1 << 16))
        if head is None:
            return []
        pattern = re.compile(rb"[}\]]\s*,\s*(\{\s*" + re.escape(head.group(1)) + rb"\s*:)")
        starts = []
        for part in range(1, parts):
            file.seek(size * part // parts)
            at = file.tell()
            match = pattern.search(file.read(1 << 22))
            if match:
                starts.append(at + match.start(1))
    return starts
