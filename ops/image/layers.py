"""Layers as bytes: tar entries become one gzip blob, and wheels go in without being inflated.

A wheel is a zip: raw deflate streams with their CRC-32. A gzip file may be several members in a row, and a member is a raw
deflate stream with its CRC-32. So each file of a wheel is copied into the layer as it is, as one member; the tar headers
between them are members of their own (:func:`deflate_plain`). Nothing is recompressed, nothing depends on a compressor's
version, and the speed is that of a copy. RFC 1951 and 1952 are the formats.

Every function is deterministic: entries come in the given order, owner 0:0, one time stamp.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

FORMAT = 1
BLOCK = 512
GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
CHUNK = 1 << 20  # bytes of a plain file read at a time
PIECE = 1 << 18  # bytes of a wheel read at a time; they stay in the processor's cache from the read to the hash to the write
PLAIN_LIMIT = 4 << 20  # bytes that are gathered before they become a gzip member
_STORED = struct.Struct("<BHH")
ZEROS = re.compile(rb"\0{24,}")


@dataclass(frozen=True)
class Entry:
    """One tar entry. ``path`` has no leading slash. A file's content is ``data``, the file ``file``, or the member ``member``
    of the zip ``archive``; ``link`` makes it a symbolic link; a directory has none of them."""

    path: str
    mode: int = 0o644
    data: bytes | None = None
    file: Path | None = None
    archive: Path | None = None
    member: zipfile.ZipInfo | None = None
    link: str | None = None

    @property
    def size(self) -> int:
        if self.member is not None:
            return self.member.file_size
        return self.file.stat().st_size if self.file is not None else len(self.data or b"")


@dataclass(frozen=True)
class Blob:
    """A written layer: the gzip bytes' sha256 (hex) and size, and the size of the tar inside."""

    sha256: str
    blob_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class _Member:
    """A raw deflate stream inside a zip: where it lies and what it inflates to."""

    archive: Path
    offset: int
    packed: int
    size: int
    crc: int
    stored: bool


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries preceded by every directory above them, sorted; a later entry of the same path replaces an earlier one."""
    files = {entry.path: entry for entry in entries}
    missing = _parents(files) - files.keys()
    directories = [Entry(path, 0o755) for path in missing] + [entry for entry in files.values() if _is_directory(entry)]
    return sorted(directories, key=lambda entry: entry.path) + [entry for entry in files.values() if not _is_directory(entry)]


def _parents(paths: Iterable[str]) -> set[str]:
    """Every folder above any of the paths."""
    found: set[str] = set()
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in found:
            found.add(path)
    return found


def write_blob(entries: Iterable[Entry], epoch: int, out: BinaryIO) -> Blob:
    """Write the gzip layer; members of zips are spliced. Raises zipfile.BadZipFile on a damaged wheel."""
    hasher, plain, packed, size = hashlib.sha256(), bytearray(), 0, 0

    def emit(*pieces: bytes | memoryview) -> None:
        nonlocal packed
        for piece in pieces:
            hasher.update(piece)
            out.write(piece)
            packed += len(piece)

    def flush() -> None:
        if plain:
            emit(gzip_member(bytes(plain)))
            plain.clear()

    with ExitStack() as stack:
        zips = _Zips(stack)
        for piece in _tar_pieces(entries, epoch, zips):
            if len(plain) >= PLAIN_LIMIT:
                flush()
            if isinstance(piece, bytes):
                plain += piece
                size += len(piece)
                continue
            size += piece.size
            if piece.stored:
                for raw in zips.pieces(piece):
                    plain += raw
            else:
                flush()
                emit(GZIP_HEAD)
                for raw in zips.pieces(piece):
                    emit(raw)
                emit(struct.pack("<LL", piece.crc, piece.size & 0xFFFFFFFF))
        flush()
    return Blob(hasher.hexdigest(), packed, size)


def diff_id(entries: Iterable[Entry], epoch: int) -> str:
    """``sha256:HEX`` of the uncompressed tar. Inflates every member once and checks its CRC-32."""
    hasher = hashlib.sha256()
    with ExitStack() as stack:
        zips = _Zips(stack)
        for piece in _tar_pieces(entries, epoch, zips):
            if isinstance(piece, bytes):
                hasher.update(piece)
                continue
            raw, crc, inflated = zips.pieces(piece), 0, 0
            for data in raw if piece.stored else _inflate(raw):
                hasher.update(data)
                crc, inflated = zlib.crc32(data, crc), inflated + len(data)
            if (crc, inflated) != (piece.crc, piece.size):
                raise zipfile.BadZipFile(f"{piece.archive.name}: the member at byte {piece.offset} fails its CRC-32")
    return "sha256:" + hasher.hexdigest()


def gzip_member(data: bytes) -> bytes:
    """``data`` as one gzip member, by :func:`deflate_plain`."""
    return GZIP_HEAD + deflate_plain(data) + struct.pack("<LL", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def packed_member(data: bytes) -> bytes:
    """``data`` as one gzip member, by zlib at its hardest; the bytes depend on zlib's version."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return GZIP_HEAD + packer.compress(data) + packer.flush() + struct.pack("<LL", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def deflate_plain(data: bytes) -> bytes:
    """A raw deflate stream of ``data`` whose bytes no compressor's version can change: stored blocks, and runs of zeros
    (most of a tar header) as one fixed-Huffman block each."""
    out, position = bytearray(), 0
    for run in ZEROS.finditer(data):
        _stored(data, position, run.start(), out)
        out += _zero_run(run.end() - run.start())
        position = run.end()
    _stored(data, position, len(data), out)
    out += b"\x01\x00\x00\xff\xff"  # an empty stored block that is marked as the last
    return bytes(out)


def tar_header(entry: Entry, epoch: int) -> bytes:
    """GNU header of an entry (with a long-name record before it where needed); the content is the caller's."""
    if entry.link is None and not _is_directory(entry) and len(name := entry.path.encode()) <= 100 and (size := entry.size) < 1 << 33:
        return _file_header(name, entry.mode, size, epoch)
    info = tarfile.TarInfo(entry.path)
    info.mode, info.mtime = entry.mode, epoch
    if entry.link is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
    elif _is_directory(entry):
        info.type = tarfile.DIRTYPE
    else:
        info.size = entry.size
    return info.tobuf(tarfile.GNU_FORMAT)


def _file_header(name: bytes, mode: int, size: int, epoch: int) -> bytes:
    """What tarfile makes of a plain file of owner 0:0, ten times as fast: an image has tens of thousands."""
    before, after = name.ljust(100, b"\0") + b"%07o\0" % mode + _OWNER + b"%011o\0%011o\0" % (size, epoch), _GNU
    return before + b"%06o\0 " % (sum(before) + 8 * 32 + sum(after)) + after


_OWNER = b"0000000\0" * 2
_GNU = (b"0" + bytes(100) + b"ustar  \0").ljust(BLOCK - 156, b"\0")


def _is_directory(entry: Entry) -> bool:
    return entry.data is None and entry.file is None and entry.member is None and entry.link is None


def _tar_pieces(entries: Iterable[Entry], epoch: int, zips: _Zips) -> Iterator[bytes | _Member]:
    """The tar as literal bytes and zip members in turn."""
    for entry in entries:
        yield tar_header(entry, epoch)
        if entry.member is not None:
            assert entry.archive is not None
            yield zips.member(entry.archive, entry.member)
        elif entry.file is not None:
            yield from _read(entry.file)
        elif entry.data:
            yield entry.data
        if rest := -entry.size % BLOCK:
            yield b"\0" * rest
    yield b"\0" * (2 * BLOCK)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class _Zips:
    """The zips being read, each opened once, closed by the stack. Read and not mapped: the kernel reads ahead, and a fault for
    every few pages costs more than the copy."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.files: dict[Path, int] = {}
        self.buffer = memoryview(bytearray(PIECE))

    def of(self, archive: Path) -> int:
        if archive not in self.files:
            file = self.stack.enter_context(archive.open("rb", buffering=0)).fileno()
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self.files[archive] = file
        return self.files[archive]

    def member(self, archive: Path, info: zipfile.ZipInfo) -> _Member:
        """Where the stream starts: the local header has name and extra lengths of its own (APPNOTE 4.3.7)."""
        head = os.pread(self.of(archive), 30, info.header_offset)
        plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
        if head[:4] != b"PK\x03\x04" or not plain:
            raise zipfile.BadZipFile(f"{archive.name}: {info.filename} is not a plain deflated member")
        name, extra = struct.unpack("<HH", head[26:30])
        stored = info.compress_type == zipfile.ZIP_STORED
        offset = info.header_offset + 30 + name + extra
        return _Member(archive, offset, info.compress_size, info.file_size, info.CRC, stored)

    def pieces(self, member: _Member) -> Iterator[memoryview]:
        """The stream; each piece is good until the next is asked for."""
        file, at, end = self.of(member.archive), member.offset, member.offset + member.packed
        while at < end:
            count = os.preadv(file, [self.buffer[: min(PIECE, end - at)]], at)
            if not count:
                raise zipfile.BadZipFile(f"{member.archive.name} ends inside of the member at byte {member.offset}")
            yield self.buffer[:count]
            at += count


def _inflate(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in pieces:
        yield inflater.decompress(piece)
    yield inflater.flush()


def _stored(data: bytes, start: int, end: int, out: bytearray) -> None:
    if 0 < end - start <= 0xFFFF:  # most are: the few bytes of a tar header between its zeros
        out += _STORED.pack(0, end - start, end - start ^ 0xFFFF)
        out += data[start:end]
        return
    for begin in range(start, end, 0xFFFF):
        piece = data[begin : min(begin + 0xFFFF, end)]
        out += _STORED.pack(0, len(piece), len(piece) ^ 0xFFFF)
        out += piece


@cache
def _zero_run(length: int) -> bytes:
    """``length`` zero bytes as a fixed-Huffman block, filled to a byte by an empty stored block (RFC 1951, 3.2.5 and 3.2.6):
    one literal 0, then copies from one byte back."""
    bits = _Bits()
    bits.number(0b010, 3)  # not the last block; fixed codes (type 01, low bit first)
    bits.code(0x30, 8)
    left = length - 1
    while left >= 3:
        copy = 258 if left >= 258 + 3 or left == 258 else min(left, 255)
        symbol, extra_bits, extra = _length_symbol(copy)
        bits.code(symbol - 256, 7) if symbol < 280 else bits.code(0xC0 + symbol - 280, 8)
        bits.number(extra, extra_bits)
        bits.code(0, 5)
        left -= copy
    for _ in range(left):
        bits.code(0x30, 8)
    bits.code(0, 7)
    bits.number(0, 3)
    return bits.bytes() + b"\x00\x00\xff\xff"


def _length_symbol(length: int) -> tuple[int, int, int]:
    """Symbol, number of extra bits, their value for a copy of 3 to 258 bytes."""
    if length == 258:
        return 285, 0, 0
    if length < 11:
        return 254 + length, 0, 0
    extra_bits = (length - 3).bit_length() - 3
    step, rest = divmod(length - 3 - (4 << extra_bits), 1 << extra_bits)
    return 261 + 4 * extra_bits + step, extra_bits, rest


class _Bits:
    """Deflate's bit order: numbers low bit first, Huffman codes high bit first."""

    def __init__(self) -> None:
        self.value = 0
        self.count = 0

    def number(self, value: int, bits: int) -> None:
        self.value |= value << self.count
        self.count += bits

    def code(self, value: int, bits: int) -> None:
        self.number(int(f"{value:0{bits}b}"[::-1], 2), bits)

    def bytes(self) -> bytes:
        return self.value.to_bytes((self.count + 7) // 8, "little")


def write_file(entries: Iterable[Entry], epoch: int, path: Path) -> Blob:
    """:func:`write_blob` into ``path``, which appears whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb", buffering=1 << 17) as out:
            blob = write_blob(entries, epoch, out)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return blob
