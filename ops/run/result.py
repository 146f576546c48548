"""Verify what a box sent before the box may be destroyed: the archive, its members, every tensor,
and whether it is what the job asked for.

Pure but for reading the file. The manifest comes from the same box as the archive, so no limit is
taken from it: sizes, ratios, names and numbers are judged on their own. Nothing is extracted, and
no regular expression from a box is run. `ops.run.sandbox` calls this in a process that has limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ops.errors import AdapterError
from ops.run.expected import ADAPTER, CONFIG, ExpectedResult, Invalid, validate
from ops.run.lora_result import validate_lora
from ops.run.prompt_result import validate_prompt
from trainer.wire import tensors
from trainer.wire.digest import sha256_of
from trainer.wire.prompts import PROMPT_METHODS
from trainer.wire.tensors import Tensor

_MAX_MEMBERS = 4096
_MAX_DIRECTORY = 4 << 20  # bytes of the archive's own list of its members
_MAX_RATIO = 100  # trained weights hardly compress; deflate's own limit is 1,032
_SLACK = 64 << 20  # bytes that any archive may unpack to: tokenizers compress well
_MAX_TEXT = 64 << 20  # bytes of one member that is not weights: Gemma's tokenizer has 33 MB
_MAX_TEXTS = 128 << 20  # of all of them
_RUNS_CODE = {  # suffixes of files that run code when they are loaded, or may
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".py",
    ".pyc",
    ".so",
    ".npy",
    ".npz",
}


@dataclass(frozen=True)
class Verified:
    """`tensors` counts the tensors, `parameters` the numbers in them; `steps` and `final_loss` are
    the manifest's."""

    sha256: str
    size_bytes: int
    tensors: int
    parameters: int = 0
    steps: int = 0
    final_loss: float = math.nan


def verify(path: Path, manifest: Mapping[str, Any], expect: ExpectedResult) -> Verified:
    """Read every byte of the archive and compare it with its manifest and with `expect`. Raises
    AdapterError that names the file or tensor and what is wrong with it."""
    try:
        manifest = as_wire_2(manifest)
        _validate_manifest(manifest, expect)
        digest = _validate_digest(path, manifest["files"][ADAPTER])
        _validate_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size, manifest["members"])
            found, json_files = _contents(archive, members, manifest["members"])
        _validate_listed(found, manifest["tensors"])
        if expect.method == "lora":
            validate_lora(found, json_files, expect)
        elif expect.method in PROMPT_METHODS:
            validate_prompt(found, json_files, expect)
        elif all(t.zero for t in found.values()):
            raise Invalid("every weight is zero")
    except Invalid as invalid:
        raise _error(str(invalid)) from invalid
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        NotImplementedError,
        EOFError,
        OSError,
        UnicodeError,
    ) as error:
        raise _error(f"adapter.zip cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _error(f"manifest.json is not what a trainer writes: {error!r}") from error
    except ValueError as error:
        raise _error(f"adapter.zip: {error}") from error
    parameters = sum(math.prod(t.shape) for t in found.values())
    return Verified(
        digest,
        path.stat().st_size,
        len(found),
        parameters,
        manifest["steps"],
        manifest["final_loss"],
    )


def _error(defect: str) -> AdapterError:
    return AdapterError(defect, hint="`milktea resume RUN` fetches it again")


# -- the manifest and the whole file ---------------------------------------------------------------


def as_wire_2(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translate a manifest of wire 1, which milktea 0.1 wrote: it listed only the archive, and
    other files without a hash. Any other manifest comes back unchanged. Raises KeyError or
    TypeError for what is not a manifest."""
    if not isinstance(manifest, Mapping) or manifest.get("wire") != 1:
        return manifest
    archive = {"sha256": manifest["adapter_sha256"], "bytes": manifest["adapter_bytes"]}
    return {**manifest, "members": manifest["files"], "files": {ADAPTER: archive}}


def _validate_manifest(manifest: Mapping[str, Any], expect: ExpectedResult) -> None:
    validate(isinstance(manifest, Mapping), "manifest.json is not an object")
    wire = manifest["wire"]
    validate(
        wire == expect.wire, f"manifest.json speaks wire {wire!r}, its job speaks {expect.wire}"
    )
    base = manifest["base_model"]
    validate(
        base == expect.base_model,
        f"manifest.json is of base model {base!r}, the job asked for {expect.base_model!r}",
    )
    method = manifest.get("method", "lora")
    validate(
        method == expect.method,
        f"manifest.json is of method {method!r}, the job asked for {expect.method!r}",
    )
    steps, loss = manifest["steps"], manifest["final_loss"]
    validate(
        type(steps) is int and steps > 0,
        f"manifest.json tells of {steps!r} steps: nothing was trained",
    )
    validate(
        type(loss) in (int, float) and math.isfinite(loss), f"manifest.json has final_loss {loss!r}"
    )
    data = manifest["data_sha256"]
    validate(
        list(data) == list(expect.data_sha256),
        f"manifest.json names data {data}, the job names {expect.data_sha256}",
    )
    if expect.method == "lora":
        validate(
            manifest["lora"]["r"] == expect.r,
            f"manifest.json has r {manifest['lora']['r']!r}, the job asked for {expect.r}",
        )


def _validate_digest(path: Path, listed: Mapping[str, Any]) -> str:
    """The file's sha256, which the manifest must have listed with its size."""
    size, listed_size = path.stat().st_size, listed["bytes"]
    validate(size == listed_size, f"adapter.zip has {size} bytes, its manifest says {listed_size}")
    found = sha256_of(path)
    wanted = listed["sha256"]
    validate(
        found == wanted,
        f"adapter.zip has sha256 {found[:16]}, its manifest says {str(wanted)[:16]}",
    )
    return found


# -- the archive -----------------------------------------------------------------------------------


_END, _END_64 = b"PK\5\6", b"PK\6\7"  # zip's end of the directory, and zip64's pointer to its own
_END_BYTES, _POINTER_BYTES, _END_64_BYTES = 22, 20, 56


def _validate_directory(path: Path) -> None:
    """The archive ends as our trainer ends it, and its directory is small: Python's zipfile reads
    all of the directory into memory first."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_BYTES - _POINTER_BYTES))
        tail = file.read()
        pointer, end = tail[:-_END_BYTES], tail[-_END_BYTES:]
        validate(
            len(end) == _END_BYTES and end[:4] == _END and end[-2:] == b"\0\0",
            "adapter.zip does not end as an archive of our trainer does",
        )
        counts = [(int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little"))]
        if pointer[:4] == _END_64:
            at = size - _END_BYTES - _POINTER_BYTES - _END_64_BYTES
            file.seek(max(0, at))
            wide = file.read(_END_64_BYTES)
            counts = [
                (int.from_bytes(wide[32:40], "little"), int.from_bytes(wide[40:48], "little"))
            ]
    for members, directory_bytes in counts:
        validate(members <= _MAX_MEMBERS, f"adapter.zip has {members} members")
        validate(
            directory_bytes <= _MAX_DIRECTORY,
            f"adapter.zip has a directory of {directory_bytes} bytes",
        )


def _members(
    archive: zipfile.ZipFile, size: int, listed: Mapping[str, Any]
) -> list[zipfile.ZipInfo]:
    """The members, validated by the archive's directory before anything is unpacked."""
    members = archive.infolist()
    validate(0 < len(members) <= _MAX_MEMBERS, f"adapter.zip has {len(members)} members")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        validate(
            _is_safe_file(member),
            f"adapter.zip: member {name!r} would be written outside its folder, or is no "
            "plain file",
        )
        validate(name.casefold() not in seen, f"adapter.zip has {name!r} twice")
        seen.add(name.casefold())
        validate(
            PurePosixPath(name).suffix.lower() not in _RUNS_CODE,
            f"adapter.zip: {name} may run code when it is loaded",
        )
        validate(not member.flag_bits & 0x41, f"adapter.zip: {name} is encrypted")
        validate(name in listed, f"adapter.zip has {name}, which its manifest does not list")
        listed_size = listed[name]["bytes"]
        validate(
            member.file_size == listed_size,
            f"adapter.zip: {name} has {member.file_size} bytes, its manifest says {listed_size}",
        )
        max_bytes = _MAX_RATIO * member.compress_size + _SLACK
        validate(
            member.file_size <= max_bytes,
            f"{name} unfolds {member.compress_size} bytes to {member.file_size}, a bomb",
        )
    missing = sorted(set(listed) - {m.filename for m in members})
    validate(not missing, f"adapter.zip lacks {', '.join(missing[:5])}")
    total = sum(m.file_size for m in members)
    validate(
        total <= _MAX_RATIO * size + _SLACK, f"adapter.zip unfolds {size} bytes to {total}, a bomb"
    )
    end = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        validate(
            member.header_offset >= end,
            f"adapter.zip: {member.filename} lies inside another member",
        )
        end = (
            member.header_offset
            + 30
            + len(member.orig_filename.encode("utf-8"))
            + member.compress_size
        )
    return members


def _is_safe_file(member: zipfile.ZipInfo) -> bool:
    """Whether it is a plain file whose name stays below the folder on every system and means the
    same to every reader."""
    name, mode = member.orig_filename, member.external_attr >> 16
    if (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        or name.startswith("/")
        or name.endswith(("/", ".", " "))
    ):
        return False
    if any(part in ("", ".", "..") for part in name.split("/")):
        return False
    return member.filename == name and stat.S_IFMT(mode) in (0, stat.S_IFREG)


class _HashingReader:
    """Reads a member of the archive and computes its size and sha256."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def hexdigest(self) -> str:
        """Of what was read."""
        return self._hash.hexdigest()


def _contents(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], listed: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(every tensor by name, adapter_config.json by its name). Each member is read once, and its
    CRC and sha256 compared; every other JSON file must be valid JSON."""
    found: dict[str, Tensor] = {}
    json_files: dict[str, Any] = {}
    validate(
        sum(m.file_size for m in members if not m.filename.endswith(".safetensors")) <= _MAX_TEXTS,
        f"adapter.zip has more than {_MAX_TEXTS} bytes beside its weights",
    )
    for member in members:
        name = member.filename
        with archive.open(member) as file, _naming(name):
            reader = _HashingReader(file)
            if name.endswith(".safetensors"):
                for tensor in tensors.read(reader, member.file_size):
                    validate(
                        tensor.name not in found, f"{name}: tensor {tensor.name} is there twice"
                    )
                    validate(
                        tensor.finite,
                        f"{name}: tensor {tensor.name} holds a number that is not finite",
                    )
                    found[tensor.name] = tensor
            else:
                validate(member.file_size <= _MAX_TEXT, f"{name} has {member.file_size} bytes")
                data = reader.read(member.file_size)
                if name.endswith(".json"):
                    value = tensors.strict_json(data)
                    json_files |= {name: value} if name == CONFIG else {}
            digest = reader.hexdigest()
        validate(
            reader.size == member.file_size,
            f"adapter.zip: {name} ends after {reader.size} of its {member.file_size} bytes",
        )
        validate(
            digest == listed[name]["sha256"],
            f"adapter.zip: {name} has another sha256 than its manifest says",
        )
    validate(bool(found), "adapter.zip holds no tensor")
    return found, json_files


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Invalid(f"adapter.zip: {name}: {error}") from error


def _validate_listed(found: Mapping[str, Tensor], listed: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
    validate(
        not missing, f"{len(missing)} tensors of the manifest are missing, first {missing[:1]}"
    )
    validate(not extra, f"{len(extra)} tensors are not in the manifest, first {extra[:1]}")
    for name, tensor in found.items():
        entry = listed[name]
        same = tensor.shape == tuple(entry["shape"]) and tensor.dtype == entry["dtype"]
        validate(
            same,
            f"tensor {name} is {tensor.dtype} {tensor.shape}, its manifest says "
            f"{entry['dtype']} {entry['shape']}",
        )
