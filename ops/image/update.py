"""How an update is made of what the server kept: of a changed layer or paper only the changed bytes travel.

INSTALL.sh keeps, each under its sha256, its own text, the papers of the bundle and the blobs of small layers (KEPT_BYTES). An
update names new files as recipes over them: "copy" so many bytes of a kept file, "take" so many of parts/changes-ID.bin. A
layer is cut where its gzip members begin and a paper at its lines, so what did not change is found by its content, wherever
it stands. The server needs dd for it, and the result must have the hash that the signed list says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ops.image.layers import GZIP_HEAD

KEPT_BYTES = 24_000_000  # a layer whose blob is larger is not kept: 100 to 180 MB on the server for today's images
MOST_ROWS = 2000  # a row costs the server a process
SHORT = 64  # bytes: a shorter piece is only copied where it continues a longer one
WORTH = 0.8  # of the file's size: a recipe that costs more is not used

MEMBERS, ENDS = re.compile(re.escape(GZIP_HEAD)), re.compile(rb"[,\n]")

Kept = Mapping[str, Path | None]  # sha256 (hex) of what the server kept -> the same content on this machine, if it is here


@dataclass(frozen=True)
class Piece:
    """``size`` bytes from ``offset`` on: of the kept file ``kept``, or of the changes where that is None."""

    kept: str | None
    offset: int
    size: int

    def row(self) -> str:
        return f"copy {self.kept} {self.offset} {self.size}" if self.kept else f"take {self.offset} {self.size}"


@dataclass(frozen=True)
class Recipe:
    path: str
    size: int
    sha256: str
    pieces: tuple[Piece, ...]

    def rows(self) -> list[str]:
        return [f"file {self.path} {self.size} {self.sha256}", *(piece.row() for piece in self.pieces)]


@dataclass(frozen=True)
class Update:
    """``changes`` is what the recipes take; a file without a recipe is carried as it is."""

    recipes: Mapping[str, Recipe]
    changes: bytes

    def text(self) -> str:
        return "".join(f"{row}\n" for recipe in self.recipes.values() for row in recipe.rows())


def plan(files: Mapping[str, bytes | Path], kept: Kept) -> Update:
    """A recipe for every file of `files` that the server can put together for much less than its size."""
    index = _Index({digest: path for digest, path in kept.items() if path is not None})
    recipes: dict[str, Recipe] = {}
    changes = bytearray()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest in kept:
            recipes[name] = Recipe(name, len(data), digest, (Piece(digest, 0, len(data)),))
            continue
        pieces, taken = _pieces(data, index, len(changes))
        if len(taken) + 90 * len(pieces) < WORTH * len(data) and len(pieces) <= MOST_ROWS:
            recipes[name] = Recipe(name, len(data), digest, tuple(pieces))
            changes += taken
    return Update(recipes, bytes(changes))


def has(kept: Kept, data: bytes) -> bool:
    """Does the server have exactly this?"""
    return hashlib.sha256(data).hexdigest() in kept


def rebuild(recipe: Recipe, changes: bytes, kept: Mapping[str, Path]) -> bytes:
    """What the server does, on this side."""
    found = [
        (kept[piece.kept].read_bytes() if piece.kept else changes)[piece.offset : piece.offset + piece.size] for piece in recipe.pieces
    ]
    return b"".join(found)


def _pieces(data: bytes, index: _Index, start: int) -> tuple[list[Piece], bytearray]:
    """The file as pieces of kept files and of new bytes, the latter numbered from `start` on."""
    found: list[Piece] = []
    taken = bytearray()
    for begin, end in _cuts(data):
        piece = data[begin:end]
        last = found[-1] if found else Piece(None, start, 0)
        if last.kept and index.continues(last, piece):
            found[-1] = Piece(last.kept, last.offset, last.size + len(piece))
        elif len(piece) >= SHORT and (at := index.find(piece)):
            found.append(Piece(*at, len(piece)))
        else:
            if found and not last.kept:
                found[-1] = Piece(None, last.offset, last.size + len(piece))
            else:
                found.append(Piece(None, start + len(taken), len(piece)))
            taken += piece
    return found, taken


def _cuts(data: bytes) -> Iterator[tuple[int, int]]:
    """Where a layer's gzip members begin, or a paper's lines and lists' items end. A false mark inside of a member does no harm."""
    packed = data[:2] == GZIP_HEAD[:2]
    ends = [x.start() for x in MEMBERS.finditer(data, 1)] if packed else [x.end() for x in ENDS.finditer(data)]
    yield from pairwise([0, *ends, *([len(data)] if not ends or ends[-1] < len(data) else [])])


def _mark(piece: bytes) -> bytes:
    """No CRC: a gzip member ends with its own, so members of one length would all have the same."""
    return hashlib.blake2b(piece, digest_size=16).digest()


class _Index:
    """Where each piece of the kept files is; a file is read when the first piece is looked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.content: dict[str, bytes] = {}
        self.at: dict[bytes, tuple[str, int]] = {}

    def find(self, piece: bytes) -> tuple[str, int] | None:
        if not self.content:
            self._read(self.files.items())
        found = self.at.get(_mark(piece))
        if found and self.content[found[0]].startswith(piece, found[1]):
            return found
        return None

    def continues(self, last: Piece, piece: bytes) -> bool:
        assert last.kept is not None
        return last.kept in self.content and self.content[last.kept].startswith(piece, last.offset + last.size)

    def _read(self, files: Iterable[tuple[str, Path]]) -> None:
        for digest, path in files:
            data = self.content[digest] = path.read_bytes()
            for begin, end in _cuts(data):
                if end - begin >= SHORT:
                    self.at.setdefault(_mark(data[begin:end]), (digest, begin))
