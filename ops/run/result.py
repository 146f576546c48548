"""What came home, looked at before the box may go: the archive, its members, every tensor, and
whether it is what was asked.

Pure but for reading the file. The manifest comes from the same box as the archive, so its word is
never taken for a limit: sizes, ratios, names and numbers are judged on their own. Nothing is
extracted, and no regular expression of a box is ever run. `ops.run.apart` calls this in a process
that has limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ops.errors import AdapterError
from trainer.families import EXPERT_PARTS
from trainer.wire import tensors
from trainer.wire.job import WIRE
from trainer.wire.tensors import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "adapter.zip"
_MAX_MEMBERS = 4096
_MAX_DIRECTORY = 4 << 20  # bytes of the archive's own list of its members
_MAX_RATIO = 100  # trained numbers hardly shrink; deflate's own limit is 1,032
_SLACK = 64 << 20  # bytes that any archive may unfold to: tokenizers shrink well
_MAX_TEXT = 64 << 20  # bytes of one member that is not weights: Gemma's tokenizer has 33 MB
_MAX_TEXTS = 128 << 20  # of all of them
# on loading, or may
_RUNS_CODE = {
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
class Expect:
    """What the job asked for; None is not checked."""

    base_model: str
    r: int
    data_sha256: tuple[str, ...]
    method: str = "lora"
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    init_lora_weights: str = "default"
    wire: int = WIRE

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Expect:
        """From a wire job (trainer.wire.job.Job, dumped)."""
        lora, named = job["lora"], job["lora"]["target_modules"]
        return cls(
            job["model"]["base"],
            lora["r"],
            tuple(f["sha256"] for f in job["data"]["files"]),
            job["training"]["method"],
            lora["lora_alpha"],
            None if isinstance(named, str) else tuple(named),
            lora["use_dora"],
            lora["use_rslora"],
            lora["init_lora_weights"],
            job["wire"],
        )


@dataclass(frozen=True)
class Verified:
    """`tensors` counts them, `parameters` their numbers; `final_loss` is the manifest's."""

    sha256: str
    size_bytes: int
    tensors: int
    parameters: int = 0
    steps: int = 0
    final_loss: float = math.nan


class _Bad(Exception):
    pass


def verify(path: Path, manifest: Mapping[str, Any], expect: Expect) -> Verified:
    """Look at every byte of the archive. Raises AdapterError that names the file or tensor and what
    is wrong with it."""
    try:
        manifest = as_wire_2(manifest)
        _manifest_sane(manifest, expect)
        digest = _whole(path, manifest["files"][ADAPTER])
        _directory_small(path)
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size, manifest["members"])
            found, texts = _contents(archive, members, manifest["members"])
        _as_listed(found, manifest["tensors"])
        if expect.method == "lora":
            _lora(found, texts, expect)
        elif all(t.zero for t in found.values()):
            raise _Bad("every weight is zero")
    except _Bad as bad:
        raise _error(str(bad)) from bad
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


def _error(what: str) -> AdapterError:
    return AdapterError(what, hint="`milktea resume RUN` fetches it again")


def _check(true: bool, what: str) -> None:
    if not true:
        raise _Bad(what)


# -- the manifest and the whole file ---------------------------------------------------------------


def as_wire_2(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest of wire 1, which milktea 0.1 wrote, as one of today's but for its number: it
    listed the archive alone, and named other files without a hash. Any other comes back as it is.
    Raises KeyError, TypeError where it is none."""
    if not isinstance(manifest, Mapping) or manifest.get("wire") != 1:
        return manifest
    archive = {"sha256": manifest["adapter_sha256"], "bytes": manifest["adapter_bytes"]}
    return {**manifest, "members": manifest["files"], "files": {ADAPTER: archive}}


def _manifest_sane(manifest: Mapping[str, Any], expect: Expect) -> None:
    _check(isinstance(manifest, Mapping), "manifest.json is not an object")
    wire = manifest["wire"]
    _check(wire == expect.wire, f"manifest.json speaks wire {wire!r}, its job speaks {expect.wire}")
    base = manifest["base_model"]
    _check(
        base == expect.base_model,
        f"manifest.json is of base model {base!r}, the job asked for {expect.base_model!r}",
    )
    method = manifest.get("method", "lora")
    _check(
        method == expect.method,
        f"manifest.json is of method {method!r}, the job asked for {expect.method!r}",
    )
    steps, loss = manifest["steps"], manifest["final_loss"]
    _check(
        type(steps) is int and steps > 0,
        f"manifest.json tells of {steps!r} steps: nothing was trained",
    )
    _check(
        type(loss) in (int, float) and math.isfinite(loss), f"manifest.json has final_loss {loss!r}"
    )
    data = manifest["data_sha256"]
    _check(
        list(data) == list(expect.data_sha256),
        f"manifest.json names data {data}, the job names {expect.data_sha256}",
    )
    if expect.method == "lora":
        _check(
            manifest["lora"]["r"] == expect.r,
            f"manifest.json has r {manifest['lora']['r']!r}, the job asked for {expect.r}",
        )


def _whole(path: Path, listed: Mapping[str, Any]) -> str:
    size, said = path.stat().st_size, listed["bytes"]
    _check(size == said, f"adapter.zip has {size} bytes, its manifest says {said}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = listed["sha256"]
    _check(
        found == wanted,
        f"adapter.zip has sha256 {found[:16]}, its manifest says {str(wanted)[:16]}",
    )
    return found


# -- the archive -----------------------------------------------------------------------------------


_END, _END_64 = b"PK\5\6", b"PK\6\7"  # zip's end of the directory, and zip64's pointer to its own
_END_BYTES, _POINTER_BYTES, _END_64_BYTES = 22, 20, 56


def _directory_small(path: Path) -> None:
    """The archive ends as our trainer ends it, and its directory is short: Python's reader takes
    the whole of it into memory before it looks."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_BYTES - _POINTER_BYTES))
        tail = file.read()
        pointer, end = tail[:-_END_BYTES], tail[-_END_BYTES:]
        _check(
            len(end) == _END_BYTES and end[:4] == _END and end[-2:] == b"\0\0",
            "adapter.zip does not end as an archive of our trainer does",
        )
        told = [(int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little"))]
        if pointer[:4] == _END_64:
            at = size - _END_BYTES - _POINTER_BYTES - _END_64_BYTES
            file.seek(max(0, at))
            wide = file.read(_END_64_BYTES)
            told = [(int.from_bytes(wide[32:40], "little"), int.from_bytes(wide[40:48], "little"))]
    for members, directory_bytes in told:
        _check(members <= _MAX_MEMBERS, f"adapter.zip has {members} members")
        _check(
            directory_bytes <= _MAX_DIRECTORY,
            f"adapter.zip has a directory of {directory_bytes} bytes",
        )


def _members(archive: zipfile.ZipFile, size: int, said: Mapping[str, Any]) -> list[zipfile.ZipInfo]:
    """The members, judged by the archive's directory before a byte is unfolded."""
    members = archive.infolist()
    _check(0 < len(members) <= _MAX_MEMBERS, f"adapter.zip has {len(members)} members")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        _check(
            _harmless(member),
            f"adapter.zip: member {name!r} would be written outside its folder, or is no "
            "plain file",
        )
        _check(name.casefold() not in seen, f"adapter.zip has {name!r} twice")
        seen.add(name.casefold())
        _check(
            PurePosixPath(name).suffix.lower() not in _RUNS_CODE,
            f"adapter.zip: {name} may run code when it is loaded",
        )
        _check(not member.flag_bits & 0x41, f"adapter.zip: {name} is encrypted")
        _check(name in said, f"adapter.zip has {name}, which its manifest does not list")
        size_said = said[name]["bytes"]
        _check(
            member.file_size == size_said,
            f"adapter.zip: {name} has {member.file_size} bytes, its manifest says {size_said}",
        )
        most = _MAX_RATIO * member.compress_size + _SLACK
        _check(
            member.file_size <= most,
            f"{name} unfolds {member.compress_size} bytes to {member.file_size}, a bomb",
        )
    missing = sorted(set(said) - {m.filename for m in members})
    _check(not missing, f"adapter.zip lacks {', '.join(missing[:5])}")
    total = sum(m.file_size for m in members)
    _check(
        total <= _MAX_RATIO * size + _SLACK, f"adapter.zip unfolds {size} bytes to {total}, a bomb"
    )
    end = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        _check(
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


def _harmless(member: zipfile.ZipInfo) -> bool:
    """A plain file whose name stays below the folder on every system, and says the same to every
    reader."""
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


class _Hashed:
    """A member of the archive on its way through sha256."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()


def _contents(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], said: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor by name, and adapter_config.json by its name, each member read once against CRC
    and sha256. Every other JSON file is sound JSON."""
    found: dict[str, Tensor] = {}
    texts: dict[str, Any] = {}
    _check(
        sum(m.file_size for m in members if not m.filename.endswith(".safetensors")) <= _MAX_TEXTS,
        f"adapter.zip has more than {_MAX_TEXTS} bytes beside its weights",
    )
    for member in members:
        name = member.filename
        with archive.open(member) as file, _naming(name):
            hashed = _Hashed(file)
            if name.endswith(".safetensors"):
                for tensor in tensors.read(hashed, member.file_size):
                    _check(tensor.name not in found, f"{name}: tensor {tensor.name} is there twice")
                    _check(
                        tensor.finite,
                        f"{name}: tensor {tensor.name} holds a number that is not finite",
                    )
                    found[tensor.name] = tensor
            else:
                _check(member.file_size <= _MAX_TEXT, f"{name} has {member.file_size} bytes")
                data = hashed.read(member.file_size)
                if name.endswith(".json"):
                    value = tensors.strict_json(data)
                    texts |= {name: value} if name == CONFIG else {}
            digest = hashed.hexdigest()
        _check(
            digest == said[name]["sha256"],
            f"adapter.zip: {name} has another sha256 than its manifest says",
        )
    _check(bool(found), "adapter.zip holds no tensor")
    return found, texts


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _Bad(f"adapter.zip: {name}: {error}") from error


def _as_listed(found: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(said) - set(found)), sorted(set(found) - set(said))
    _check(not missing, f"{len(missing)} tensors of the manifest are missing, first {missing[:1]}")
    _check(not extra, f"{len(extra)} tensors are not in the manifest, first {extra[:1]}")
    for name, tensor in found.items():
        listed = said[name]
        same = tensor.shape == tuple(listed["shape"]) and tensor.dtype == listed["dtype"]
        _check(
            same,
            f"tensor {name} is {tensor.dtype} {tensor.shape}, its manifest says "
            f"{listed['dtype']} {listed['shape']}",
        )


# -- LoRA ------------------------------------------------------------------------------------------

_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$"
)


def _lora(found: Mapping[str, Tensor], texts: Mapping[str, Any], expect: Expect) -> None:
    """The tensors are the LoRA that the job asked for: PEFT's names, both halves of each pair, the
    rank, something learnt."""
    _check(CONFIG in texts, f"adapter.zip lacks {CONFIG}")
    config = texts[CONFIG]
    _check(
        isinstance(config, dict) and config.get("peft_type") == "LORA", f"{CONFIG} is not a LoRA's"
    )
    # PiSSA comes home as a difference
    ranks = {expect.r, 2 * expect.r} if expect.init_lora_weights == "pissa" else {expect.r}
    r = config.get("r")
    _check(type(r) is int and r in ranks, f"{CONFIG} has r {r!r}, the job asked for {expect.r}")
    base = config.get("base_model_name_or_path")
    _check(
        base == expect.base_model,
        f"{CONFIG} is of base model {base!r}, the job asked for {expect.base_model!r}",
    )
    for key in ("lora_alpha", "use_dora", "use_rslora"):
        wanted, have = getattr(expect, key), config.get(key)
        doubled = key == "lora_alpha" and r != expect.r
        _check(
            wanted is None or doubled or have == wanted,
            f"{CONFIG} has {key} {have!r}, the job asked for {wanted!r}",
        )
    _targets(found, config, expect)
    pairs = _pairs(found, config)
    _check(bool(pairs), f"{WEIGHTS} holds no LoRA pair")
    _shapes(pairs, config)
    learnt = any(not a.zero and not b.zero for a, b in pairs.values())
    _check(
        learnt,
        f"{WEIGHTS}: one half of each of the {len(pairs)} modules is zero: nothing was learnt",
    )


def _targets(found: Mapping[str, Tensor], config: Mapping[str, Any], expect: Expect) -> None:
    """Every tensor belongs to a target module or to modules_to_save, and every target has
    tensors."""
    named = config.get("target_modules")
    if expect.target_modules is not None:
        _check(
            _as_asked(named, config, expect.target_modules),
            f"{CONFIG} has target_modules {named}, the job asked for {list(expect.target_modules)}",
        )
    kept = config.get("modules_to_save") or []
    _check(
        isinstance(kept, list) and all(isinstance(k, str) for k in kept),
        f"{CONFIG} has modules_to_save {kept!r}",
    )
    modules = {m["module"] for m in map(_PART.match, found) if m}
    for name in found:
        owned = _PART.match(name) or any(f".{k}." in f".{name}" for k in kept)
        _check(bool(owned), f"{WEIGHTS}: tensor {name} belongs to no LoRA and no module to save")
    if isinstance(named, list):
        ends = tuple(named)
        for module in modules:
            if _of_experts(module, config):
                continue
            aimed = any(module == end or module.endswith("." + end) for end in ends)
            _check(aimed, f"{WEIGHTS}: {module} is none of {CONFIG}'s target_modules")
        for end in ends:
            _check(
                any(m == end or m.endswith("." + end) for m in modules),
                f"{WEIGHTS}: target {end!r} has no tensors",
            )


def _pairs(
    found: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        if match := _PART.match(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    dora = bool(config.get("use_dora"))
    pairs = {}
    for module, have in parts.items():
        kind = (
            "lora_embedding_"
            if "lora_embedding_A" in have or "lora_embedding_B" in have
            else "lora_"
        )
        for half in (f"{kind}A", f"{kind}B", *(["lora_magnitude_vector"] if dora else [])):
            _check(half in have, f"{WEIGHTS}: {module} lacks its {half}")
        _check(
            dora or "lora_magnitude_vector" not in have,
            f"{WEIGHTS}: {module} has a DoRA vector, {CONFIG} wants none",
        )
        a, b = have[f"{kind}A"], have[f"{kind}B"]
        # the half that PEFT fills with random numbers; the other starts at zero
        random = b if kind == "lora_embedding_" else a
        _check(
            not random.zero, f"{WEIGHTS}: {random.name} is all zero, which no initialisation gives"
        )
        if dora:
            vector = have["lora_magnitude_vector"]
            fits = math.prod(vector.shape) == b.shape[0] and not vector.zero
            _check(
                fits,
                f"{WEIGHTS}: {vector.name} {vector.shape} does not fit lora_B {b.shape}, or "
                "is all zero",
            )
        pairs[module] = (a, b)
    return pairs


def _as_asked(named: Any, config: Mapping[str, Any], asked: tuple[str, ...]) -> bool:
    """Whether `named` means the modules that the job asked for: as they are, in an expression that
    keeps to one tower, or without the parts of experts, which are target_parameters."""
    if isinstance(named, str):
        return all(re.escape(module) in named for module in asked)
    if not isinstance(named, list) or not set(named) <= set(asked):
        return False
    left = set(asked) - set(named)
    return not left or (bool(config.get("target_parameters")) and left <= set(EXPERT_PARTS))


def _of_experts(module: str, config: Mapping[str, Any]) -> bool:
    """Whether an adapter stands on the experts that target_parameters names: PEFT calls it by the
    module that holds them, or its base_layer where it has two."""
    named = config.get("target_parameters") or []
    holders = {str(p).rpartition(".")[0] for p in named if isinstance(p, str)}
    held = module.removesuffix(".base_layer")
    return any(h and (held == h or held.endswith("." + h)) for h in holders)


def _shapes(pairs: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> None:
    pattern = _literal_ranks(config)
    for module, (a, b) in pairs.items():
        if _of_experts(module, config):  # the ranks of all experts side by side
            same = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
            _check(same, f"{WEIGHTS}: {module} has lora_A {a.shape} and lora_B {b.shape}")
            continue
        special = [r for end, r in pattern.items() if f".{module}".endswith(f".{end}")]
        r = special[0] if special else config["r"]
        fits = len(a.shape) >= 2 and len(b.shape) >= 2 and a.shape[0] == r and b.shape[1] == r
        _check(
            fits,
            f"{WEIGHTS}: {module} has lora_A {a.shape} and lora_B {b.shape}, {CONFIG} says r {r}",
        )
        _check(
            a.dtype == b.dtype,
            f"{WEIGHTS}: {module} has lora_A in {a.dtype} and lora_B in {b.dtype}",
        )


def _literal_ranks(config: Mapping[str, Any]) -> Mapping[str, int]:
    """PEFT's rank_pattern of names of modules. PEFT takes regular expressions too; our trainer
    writes none, and one of a stranger's may run for ever."""
    pattern = config.get("rank_pattern") or {}
    sound = isinstance(pattern, dict) and all(
        re.fullmatch(r"[A-Za-z0-9_.]{1,200}", end) and type(r) is int for end, r in pattern.items()
    )
    _check(sound, f"{CONFIG} has a rank_pattern that is no list of modules: {pattern!r:.80}")
    return dict(pattern)
