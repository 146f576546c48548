"""A seeded mutator: bytes that somebody sent, spoiled as a bad link, a bad disk or a bad person
would."""

from __future__ import annotations

import json
import random
import re
from typing import Any

NUMBERS = (
    "0", "-0", "-1", "1e999", "-1e999", "1e308", "5e-324", "NaN", "Infinity", "-Infinity",
    "null", str(2**31), str(2**53 + 1), str(2**63), str(-(2**63) - 1), "9" * 400, "9" * 5000,
    "1" + "0" * 22, "0.1e-400", "true", '"7"', "007", "1_000", "0x10", "٣", "",
)  # fmt: skip
TEXTS = (
    "", " ", "\x00", "\u2028", "\u2029", "\x85", "\x1b[2J\x1b]0;x\x07", "\u202e", "\ud800",
    "\udfff\ud800", "\ufeff", "\U0010ffff", "e\u0301" * 50, "../../../../etc/passwd", "/dev/zero",
    "-rf", "a" * 70_000, "名", "%s%n{0}{name}{{x}}", "${HOME}", "<script>", "\r\n", "\n", "\t",
    "NaN", "None", "=1+1", "((a+)+)+$", "con.txt", "a/b", ".", "..", "~", "file:///etc/passwd",
    "http://[::1", "https://x.vast.ai:99999/", "__proto__", "__class__", "user", "assistant",
)  # fmt: skip
BYTES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80",
    b"\r", b"\n", b"\r\n", b"\x1a", b"\xe2\x80\xa8", b"[", b"]", b"{", b"}", b'"', b"\\", b"\\u",
    b"\\ud83d", b",", b":", b"'", b"/*", b"#", b"\x1f\x8b", b"PK\5\6", b"PK\1\2", b"PAR1",
    b"ARROW1", b"=milktea= 0 yes 9", b"=milktea-facts= gpu",
)  # fmt: skip
DEEP = (1, 50, 900, 100_000)  # brackets in each other
LARGEST = 4 << 20  # bytes of an input
_NEST = "@NEST@"


def _size(value: Any) -> int:
    """Characters of it as JSON; more than an input may have where it is too deep to be written."""
    try:
        return len(json.dumps(value))
    except RecursionError:
        return LARGEST


class Mutator:
    """`rng` decides everything: equal seeds give equal bytes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def of(self, data: bytes, others: list[bytes]) -> bytes:
        """`data` after one to four spoilings; parts of `others` may stand in it."""
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3, 4))):
            made = self._once(data, others)
            data = made if len(made) < LARGEST else data
        return data

    def _once(self, data: bytes, others: list[bytes]) -> bytes:
        if self.rng.random() < 0.45:
            for read in (self._json, self._json_line):
                if (made := read(data)) is not None:
                    return made
        if self.rng.random() < 0.3 and (made := self._number(data)) is not None:
            return made
        if self.rng.random() < 0.1:
            return self._splice(data, self.rng.choice(others))
        ways = (self._flip, self._cut, self._remove, self._twice, self._insert, self._many)
        return self.rng.choice(ways)(data)

    # -- bytes -------------------------------------------------------------------------------------

    def _span(self, data: bytes) -> tuple[int, int]:
        begin = self.rng.randrange(len(data) + 1)
        most = min(len(data) - begin, self.rng.choice((1, 4, 32, 1 << 20)))
        return begin, begin + self.rng.randrange(most + 1)

    def _flip(self, data: bytes) -> bytes:
        made = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 4, 16)) if made else 0):
            made[self.rng.randrange(len(made))] ^= 1 << self.rng.randrange(8)
        return bytes(made)

    def _cut(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data) + 1)]

    def _remove(self, data: bytes) -> bytes:
        begin, end = self._span(data)
        return data[:begin] + data[end:]

    def _twice(self, data: bytes) -> bytes:
        begin, end = self._span(data)
        return data[:end] + data[begin:end] + data[end:]

    def _insert(self, data: bytes) -> bytes:
        begin, end = self._span(data)
        text = self.rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        return (
            data[:begin] + self.rng.choice((*BYTES, text)) + data[self.rng.choice((begin, end)) :]
        )

    def _many(self, data: bytes) -> bytes:
        begin, _ = self._span(data)
        return data[:begin] + self.rng.choice(BYTES) * self.rng.choice(DEEP) + data[begin:]

    def _splice(self, data: bytes, other: bytes) -> bytes:
        return data[: self._span(data)[0]] + other[self._span(other)[0] :]

    def _number(self, data: bytes) -> bytes | None:
        found = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 1 << 16]))
        if not found:
            return None
        at = self.rng.choice(found)
        return data[: at.start()] + self.rng.choice(NUMBERS).encode() + data[at.end() :]

    # -- JSON --------------------------------------------------------------------------------------

    def _json_line(self, data: bytes) -> bytes | None:
        lines = data.split(b"\n")
        n = self.rng.randrange(len(lines))
        made = self._json(lines[n])
        return None if made is None else b"\n".join([*lines[:n], made, *lines[n + 1 :]])

    def _json(self, data: bytes) -> bytes | None:
        """One value, key or row of it replaced, removed, given twice or wrapped; None for what is
        no object and no list."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict | list) or not value:
            return None
        self._spoil(value)
        try:
            text = json.dumps(value, ensure_ascii=self.rng.random() < 0.5)
        except (ValueError, RecursionError):
            return None
        depth = self.rng.choice(DEEP)
        left, right = self.rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(f'"{_NEST}"', left * depth + "1" + right * depth)
        for number in NUMBERS:
            text = text.replace(f'"@N{number}@"', number)
        return text.encode("utf-8", "surrogatepass")

    def _spoil(self, value: Any) -> None:
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = self.rng.choice(keys)
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or self.rng.random() < 0.3:
                break
            at = inner
        match self.rng.randrange(6):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[self.rng.choice((*TEXTS[:12], key + "x", key.upper(), "@NEST@"))] = at.pop(key)
            case 1:
                at.insert(key, inner)
            case 2:
                times = self.rng.choice((1, 2, 3000))
                at[key] = [inner] * (times if times * _size(inner) < LARGEST else 2)
            case 3:
                at[key] = {str(key): inner}
            case _:
                at[key] = self._odd()

    def _odd(self) -> Any:
        number = f"@N{self.rng.choice(NUMBERS[:-6])}@"
        rest = (None, True, False, [], {}, [[]], [None], {"": None}, _NEST, 2**70, 1e300, -1, 0)
        return self.rng.choice((number, self.rng.choice(TEXTS), self.rng.choice(rest)))
