"""How an update is made of what the server kept: of a changed layer or paper only the changed bytes travel.

INSTALL.sh keeps, each under its sha256, its own text, the papers of the bundle and the blobs of small layers (KEPT_BYTES). An
update names new files as recipes over them: "copy" so many bytes of a kept file, "take" the next so many of what the update
carries. A layer is cut where its gzip members begin, which are found by their content wherever they stand; papers are compared
byte by byte. The server needs dd for it, and the result must have the hash that the signed FACTS say.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ops.image.layers import GZIP_HEAD

KEPT_BYTES = 24_000_000  # a layer whose blob is larger is not kept: 100 to 180 MB on the server for today's images
MOST_ROWS = 2000  # a row costs the server a process
SHORT = 64  # bytes: a shorter member is only copied where it continues a longer one
WORTH = 0.97  # of the file's size: a recipe that costs more is not used
GRAM, MATCH = 20, 32  # bytes: what is looked up of a paper, and the shortest piece that is worth the two rows it costs
NEAR = 4  # of the places that look the same, how many are tried

MEMBERS = re.compile(re.escape(GZIP_HEAD))

Kept = Mapping[str, Path | None]  # sha256 (hex) of what the server kept -> the same content on this machine, if it is here


@dataclass(frozen=True)
class Piece:
    """``size`` bytes from ``offset`` on of the kept file ``kept``; or where that is None, the next ``size`` of what is carried."""

    kept: str | None
    offset: int
    size: int


@dataclass(frozen=True)
class Recipe:
    """``start`` is where its first carried byte lies: in the changes of layers for a layer, else in those of papers."""

    path: str
    start: int
    pieces: tuple[Piece, ...]

    def rows(self) -> Iterator[str]:
        yield f"file {self.path} {self.start}"
        last = ""
        for piece in self.pieces:
            if piece.kept is None:
                yield f"take {piece.size}"
                continue
            if piece.kept[:16] != last:
                last = piece.kept[:16]
                yield f"from {last}"
            yield f"copy {piece.offset} {piece.size}"


@dataclass(frozen=True)
class Update:
    """A file without a recipe that is not among the ``same``, which the server keeps whole, is carried as it is."""

    recipes: Mapping[str, Recipe]
    same: frozenset[str]
    papers: bytes = b""
    layers: bytes = b""

    @property
    def made(self) -> frozenset[str]:
        """What the server has or makes."""
        return self.same | self.recipes.keys()

    def text(self) -> str:
        return "".join(f"{row}\n" for recipe in self.recipes.values() for row in recipe.rows())


NOTHING = Update({}, frozenset())


def plan(files: Mapping[str, bytes | Path], kept: Kept) -> Update:
    """How the server comes by each of `files`: papers as bytes, layers as paths."""
    here = {digest: path for digest, path in kept.items() if path is not None}
    index = _Members({digest: path for digest, path in here.items() if _is_packed(path)})
    texts = _Texts({digest: path for digest, path in here.items() if not _is_packed(path)})
    recipes: dict[str, Recipe] = {}
    same: set[str] = set()
    papers, layers = bytearray(), bytearray()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        if hashlib.sha256(data).hexdigest() in kept:
            same.add(name)
            continue
        carried = papers if isinstance(content, bytes) else layers
        pieces = list(texts.pieces(data) if isinstance(content, bytes) else index.pieces(data))
        recipe = Recipe(name, len(carried), tuple(piece for piece, _ in pieces))
        taken = b"".join(taken for _, taken in pieces)
        rows = list(recipe.rows())
        if len(taken) + sum(map(len, rows)) + len(rows) < WORTH * len(data) and len(rows) <= MOST_ROWS:
            recipes[name] = recipe
            carried += taken
    return Update(recipes, frozenset(same), bytes(papers), bytes(layers))


def has(kept: Kept, data: bytes) -> bool:
    """Does the server have exactly this?"""
    return hashlib.sha256(data).hexdigest() in kept


def rebuild(recipe: Recipe, carried: bytes, kept: Mapping[str, Path]) -> bytes:
    """What the server does, on this side."""
    out, at = bytearray(), recipe.start
    for piece in recipe.pieces:
        if piece.kept:
            out += kept[piece.kept].read_bytes()[piece.offset : piece.offset + piece.size]
        else:
            out += carried[at : at + piece.size]
            at += piece.size
    return bytes(out)


Pieces = Iterator[tuple[Piece, bytes]]  # each with the bytes that must be carried for it


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP_HEAD[:2]


def _carry(data: bytes) -> tuple[Piece, bytes]:
    return Piece(None, 0, len(data)), data


class _Members:
    """Where each gzip member of the kept layers is; they are read when the first member is looked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.content: dict[str, bytes] = {}
        self.at: dict[bytes, tuple[str, int]] = {}

    def pieces(self, data: bytes) -> Pieces:
        last: Piece | None = None
        new = bytearray()
        for begin, end in self._cuts(data):
            member = data[begin:end]
            if last and self._continues(last, member):
                last = Piece(last.kept, last.offset, last.size + len(member))
                continue
            if last:
                yield last, b""
                last = None
            if len(member) >= SHORT and (at := self._find(member)):
                if new:
                    yield _carry(bytes(new))
                    new.clear()
                last = Piece(*at, len(member))
            else:
                new += member
        if last:
            yield last, b""
        if new:
            yield _carry(bytes(new))

    @staticmethod
    def _cuts(data: bytes) -> Iterator[tuple[int, int]]:
        """A false mark inside of a member does no harm."""
        yield from pairwise([0, *(found.start() for found in MEMBERS.finditer(data, 1)), len(data)])

    @staticmethod
    def _mark(member: bytes) -> bytes:
        """No CRC: a gzip member ends with its own, so members of one length would all have the same."""
        return hashlib.blake2b(member, digest_size=16).digest()

    def _find(self, member: bytes) -> tuple[str, int] | None:
        if not self.content:
            for digest, path in self.files.items():
                data = self.content[digest] = path.read_bytes()
                for begin, end in self._cuts(data):
                    if end - begin >= SHORT:
                        self.at.setdefault(self._mark(data[begin:end]), (digest, begin))
        found = self.at.get(self._mark(member))
        return found if found and self.content[found[0]].startswith(member, found[1]) else None

    def _continues(self, last: Piece, member: bytes) -> bool:
        assert last.kept is not None
        return self.content[last.kept].startswith(member, last.offset + last.size)


class _Texts:
    """The kept papers in a row, and where each GRAM bytes of them stand."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.starts: list[int] = []
        self.digests = list(files)
        self.text = bytearray()
        self.at: dict[bytes, list[int]] = {}
        for path in files.values():
            begin, data = len(self.text), path.read_bytes()
            self.starts.append(begin)
            self.text += data
            for offset in range(len(data) - GRAM + 1):
                self.at.setdefault(data[offset : offset + GRAM], []).append(begin + offset)
        self.starts.append(len(self.text))

    def pieces(self, data: bytes) -> Pieces:
        done, at, expected = 0, 0, 0  # carried or copied up to here; looked at up to here; where the next match would be in line
        while at < len(data):
            begin, size, place = self._longest(data, done, at, expected)
            if size < MATCH:
                at, expected = at + 1, expected + 1
                continue
            if begin > done:
                yield _carry(data[done:begin])
            number = self._number(place)
            yield Piece(self.digests[number], place - self.starts[number], size), b""
            done = at = begin + size
            expected = place + size
        if done < len(data):
            yield _carry(data[done:])

    def _longest(self, data: bytes, done: int, at: int, expected: int) -> tuple[int, int, int]:
        """Of the places whose next bytes are those at `at`, the one with most in common: where that begins in the data, how much
        it is, where it stands. Of a paper full of repetitions only places near to the expected one are tried."""
        places = self.at.get(data[at : at + GRAM], [])
        middle = bisect_left(places, expected)
        best = (at, 0, 0)
        for place in places[max(0, middle - NEAR // 2) : middle + NEAR // 2]:
            number = self._number(place)
            low, high = self.starts[number], self.starts[number + 1]
            back = 0
            while at - back > done and place - back > low and data[at - back - 1] == self.text[place - back - 1]:
                back += 1
            ahead = GRAM
            while at + ahead < len(data) and place + ahead < high and data[at + ahead] == self.text[place + ahead]:
                ahead += 1
            if back + ahead > best[1]:
                best = (at - back, back + ahead, place - back)
        return best

    def _number(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1
