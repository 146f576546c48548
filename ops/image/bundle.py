"""A bundle: a folder that explains itself and brings an image, its base models and an installer to a server without a network.

    INSTALL.sh  README.{en,zh}.txt      what to run, what to read
    PLAN                                what INSTALL.sh follows, one fact a line (a shell cannot read JSON)
    MANIFEST.json                       the same for programs: every file, its hash, its role, the layers
    SHA256SUMS  .sig  .openssl  keys/   one line a file; the signature is over this
    parts/NN-NAME-HASH.tar[.vNNN]       plain `docker load` archives: one large layer each, or a run of small ones
    models/SET/...  parity/P.NN  sbom/  licenses/  tools/  image.lock

An update (``base``) carries the layers that the base lacks. Where a changed layer lies under unchanged ones, the overlay2
store needs those again: INSTALL.sh takes them from the image on the server, and the bundle has only their archive headers.
The same inputs give the same bytes, but for the signature: ECDSA draws a random number.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ops.errors import ConfigError, PreflightError
from ops.image import archive, parity, sbom, sign, volumes
from ops.image.driver import Line
from ops.image.inventory import Present, shared_prefix
from ops.image.lock import Lock, Model, dumps

SERVER = Path(__file__).parent / "server"
SMALL_BYTES = 32_000_000
BATCH_BYTES = 256_000_000  # unchanged layers are given back to the engine in archives of about this size, or one layer's
FORMAT = 1


@dataclass(frozen=True)
class Cargo:
    """What goes in: the whole lock of one build, the image with its layers on disk, and a folder for each model of the lock
    that is not in the image. ``line`` is the CUDA line of the image, ``lines`` every line of the project (for remedies).
    ``prove`` is the command that the image proves itself with, ``evidence`` its Python, or None."""

    lock: Lock
    image: archive.Image
    models: dict[str, Path]
    line: Line
    lines: tuple[Line, ...] = ()
    prove: tuple[str, ...] = ("python3", "-m", "trainer.selftest")
    evidence: str | None = "python3"
    memory_bytes: int = 4_000_000_000


@dataclass(frozen=True)
class Options:
    """``volume_bytes`` 0 leaves files whole (FAT32 holds 4 GiB less one byte). ``parity_members`` volumes share one parity file;
    0 writes none. ``base`` is what the server has: the bundle brings the rest; ``base_models`` are set digests that it has."""

    volume_bytes: int = 0
    parity_members: int = 8
    base: Present | None = None
    base_models: frozenset[str] = frozenset()
    key: Path | None = None


@dataclass(frozen=True)
class Bundle:
    folder: Path
    id: str
    kind: str
    size_bytes: int
    carried_layers: int


@dataclass(frozen=True)
class Step:
    """One `docker load`: brings layers first..last, of which ``carry`` are in the file and ``reuse`` come from the server."""

    first: int
    last: int
    carry: tuple[int, ...]
    reuse: tuple[int, ...] = ()


def write_bundle(cargo: Cargo, out: Path, options: Options = Options(), progress: Callable[[str], None] = lambda _: None) -> Bundle:
    """Write the bundle into `out`, which must be empty or absent; it appears whole (a folder `out`.part is renamed).

    Raises ConfigError for an `out` that holds something, PreflightError for a missing layer or model file, or no room.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint=f"rm -r {out}, or name another folder")
    _check_room(cargo, options, out)
    folder = out.with_name(out.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = plan_steps(cargo.image, options.base)
    progress(f"writing {len(steps)} archives")
    files = _write_parts(cargo, steps, folder, options)
    files |= _write_models(cargo, folder, options)
    files |= _write_parity(files, folder, options)
    _write_small(cargo, steps, files, folder, options)
    _write_sums(files, folder, options)
    if out.exists():
        out.rmdir()
    folder.rename(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return Bundle(out, bundle_id(cargo.image), "delta" if options.base else "full", size, sum(len(s.carry) for s in steps))


def bundle_id(image: archive.Image) -> str:
    """Twelve digits of the image's config digest: two bundles with the same id bring the same image."""
    return image.config_digest.removeprefix("sha256:")[:12]


def plan_steps(image: archive.Image, base: Present | None) -> list[Step]:
    """Which archives the bundle holds. Full: every layer of SMALL_BYTES or more in its own, runs of smaller ones together (an
    engine takes a quarter of a second for any archive). Update: what lies above the layers shared with the base, each new layer
    carried; once an unchanged layer lies above a changed one, archives of mixed origin, of about BATCH_BYTES."""
    shared = shared_prefix(base.layers, image.diff_ids) if base else 0
    has = set(base.layers) if base else set()
    limit = max(BATCH_BYTES, max(layer.size_bytes for layer in image.layers))
    steps: list[Step] = []
    for k, layer in enumerate(image.layers[shared:], shared + 1):
        new = Step(k, k, (), (k,)) if layer.diff_id in has else Step(k, k, (k,))
        both = Step(steps[-1].first, k, steps[-1].carry + new.carry, steps[-1].reuse + new.reuse) if steps else new
        held = image.layers[both.first - 1 : k]
        small = sum(x.blob_bytes for x in held) <= SMALL_BYTES
        joins = sum(x.size_bytes for x in held) <= limit if both.reuse else small
        steps = [*steps[:-1], both] if steps and joins else [*steps, new]
    return steps


def step_name(image: archive.Image, step: Step) -> str:
    """Says which layers; its last digits are of their content, so that parts of two bundles are told apart by their names."""
    held = image.layers[step.first - 1 : step.last]
    if len(held) == 1 and step.carry:
        return f"parts/{step.first:02d}-{_safe(held[0].name)}-{held[0].blob_sha256[:8]}.tar"
    mark = hashlib.sha256("".join(x.blob_sha256 for x in held).encode() + (bundle_id(image).encode() if step.reuse else b"")).hexdigest()
    return f"parts/{step.first:02d}-to-{step.last:02d}-{mark[:8]}.tar"


def step_tag(image: archive.Image, step: Step) -> str:
    return final_tag(image) if step.last == len(image.layers) else f"{stair(image)}-{step.last:02d}"


def final_tag(image: archive.Image) -> str:
    """What the loaded image is called. Made of its content, so that an update never takes the name of what runs now."""
    return f"{image.tag.rpartition(':')[0] or image.tag}:{bundle_id(image)}"


def stair(image: archive.Image) -> str:
    """The beginning of the tags of the images that exist while a bundle is loaded."""
    return f"{image.tag.rpartition(':')[0] or image.tag}:stair-{bundle_id(image)[:8]}"


def _write_parts(cargo: Cargo, steps: list[Step], folder: Path, options: Options) -> volumes.Files:
    """Two threads: hashing releases the interpreter, and layers are big."""
    (folder / "parts").mkdir()

    def one(step: Step) -> volumes.Files:
        name = step_name(cargo.image, step)
        shown = archive.prefix(cargo.image, step.last, step_tag(cargo.image, step))
        with volumes.Writer(folder, name, options.volume_bytes, role="part") as out:
            try:
                archive.write_archive(replace(shown, tag=step_tag(cargo.image, step)), out, carry=step.carry)  # type: ignore[arg-type]
            except OSError as error:
                raise PreflightError(f"{name}: {error}", hint=f"make image IMAGE={cargo.lock.image}") from error
        headers = b"".join(archive_header(cargo.image.layers[k - 1]) for k in step.reuse)
        return out.files | (volumes.write_small(folder, f"{name}.reuse", headers, role="headers") if headers else {})

    with ThreadPoolExecutor(2) as pool:
        return volumes.merge(pool.map(one, steps))


def archive_header(layer: archive.Layer) -> bytes:
    """The tar header under which an uncompressed layer stands where the archive's docker manifest expects its blob."""
    import tarfile

    entry = tarfile.TarInfo(f"blobs/sha256/{layer.blob_sha256}")
    entry.size, entry.mode = layer.size_bytes, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def _write_models(cargo: Cargo, folder: Path, options: Options) -> volumes.Files:
    found: volumes.Files = {}
    for model in _models_beside(cargo, options):
        source = cargo.models.get(model.name)
        for file in model.files:
            path = source / file.path if source else None
            if path is None or not path.is_file():
                raise PreflightError(f"model {model.name}: {file.path} is missing", hint=f"make fetch IMAGE={cargo.lock.image}")
            name = f"models/{model.set_digest.removeprefix('sha256:')}/{_safe_path(file.path)}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with volumes.Writer(folder, name, options.volume_bytes, role="model") as out, path.open("rb") as content:
                shutil.copyfileobj(content, out, 1 << 20)
            if out.sha256 != file.sha256:
                hint = f"make fetch IMAGE={cargo.lock.image} brings it again"
                raise PreflightError(f"model {model.name}: {file.path} is not the file of the lock (half downloaded, or changed)", hint=hint)
            found |= out.files
    return found


def _models_beside(cargo: Cargo, options: Options) -> list[Model]:
    return [m for m in cargo.lock.models if not m.bundled and m.set_digest not in options.base_models]


def _write_parity(files: volumes.Files, folder: Path, options: Options) -> volumes.Files:
    if not options.parity_members:
        return {}
    (folder / "parity").mkdir()
    sizes = {path: f.size_bytes for path, f in files.items()}
    found: volumes.Files = {}
    for group in parity.groups(sizes, options.parity_members):
        name = f"parity/P.{group.name}"
        digest = parity.xor_files([folder / m for m in group.members], group.size_bytes, folder / name)
        found[name] = volumes.File(group.size_bytes, digest, "parity", group.name)
        for member in group.members:
            files[member] = replace(files[member], group=group.name)
    return found


def _write_small(cargo: Cargo, steps: list[Step], files: volumes.Files, folder: Path, options: Options) -> None:
    """The files that explain and install; in no parity group, because one must read them to use parity."""
    script = "".join(p.read_text("utf-8") for p in sorted((SERVER / "install").glob("[0-9]*.sh")))
    texts = {
        "INSTALL.sh": script,
        "PLAN": "".join(line + "\n" for line in _plan(cargo, steps, files, options)),
        "image.lock": dumps(cargo.lock),
        "sbom/image.cdx.json": sbom.cyclonedx(cargo.lock).decode(),
        "licenses/INDEX.txt": sbom.licences(cargo.lock),
        "preflight.json": _json(_needs(cargo)),
        "tools/milktea-run": (SERVER / "milktea-run.sh").read_text("utf-8"),
        **{f"tools/{name}": text for name, text in _tools().items()},
    }
    texts |= {f"README.{x}.txt": _readme(cargo, files, x) for x in ("en", "zh")}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files |= volumes.write_small(folder, name, text.encode(), role="small")
    if options.key:
        for name, data in sign.public_files(options.key).items():
            (folder / "keys").mkdir(exist_ok=True)
            files |= volumes.write_small(folder, f"keys/{name}", data, role="small")
    (folder / "INSTALL.sh").chmod(0o755)
    files |= volumes.write_small(folder, "MANIFEST.json", _json(_manifest(cargo, files, options)).encode(), role="small")


def _tools() -> dict[str, str]:
    """What runs inside the image but is of the bundle: the converter of job files (ops.config is in the image), scoring, the
    evidence page."""
    found = {name: (SERVER / name).read_text("utf-8") for name in ("job_from_toml.py", "score.py")}
    return found | {"evidence.py": (SERVER.parent / "evidence.py").read_text("utf-8")}


def _plan(cargo: Cargo, steps: list[Step], files: volumes.Files, options: Options) -> list[str]:
    """What INSTALL.sh reads: one fact a line, fields apart by spaces; server/install/10-plan.sh is its reader."""
    image, lock = cargo.image, cargo.lock
    carried = {k for s in steps for k in s.carry}
    shared = steps[0].first - 1 if steps else len(image.layers)
    state = {k: "carried" if k in carried else "base" if k <= shared else "reuse" for k in range(1, len(image.layers) + 1)}
    lines = [
        f"milktea-bundle {FORMAT}",
        f"name {lock.image}",
        f"id {bundle_id(image)}",
        f"kind {'delta' if options.base else 'full'}",
        f"ref {final_tag(image)}",
        f"stair {stair(image)}",
        f"wire {lock.wire}",
        f"platform {lock.platform.rpartition('/')[2]}",
        f"cuda {cargo.line.cuda or 'none'}",
        f"line_name {cargo.line.name}",
        f"files {max(1000, sum(x.size_bytes for x in image.layers) // 40_000)}",
        f"memory_bytes {cargo.memory_bytes}",
        f"prove {' '.join(cargo.prove)}",
    ]
    lines += [f"signature {name}" for name in sign.signature_names("SHA256SUMS", options.key)] if options.key else []
    lines += [f"since {options.base.ref}"] if options.base else []
    lines += [f"evidence {cargo.evidence}"] if cargo.evidence else []
    lines += [f"tool {name}" for name in _tools()]
    lines += [
        f"layer {k} {x.diff_id} {x.size_bytes} {x.blob_sha256} {x.blob_bytes} {_safe(x.name)} {state[k]}" for k, x in enumerate(image.layers, 1)
    ]
    if options.base:
        lines += [f"full {s.first} {s.last} {step_name(image, s)} {step_tag(image, s)}" for s in plan_steps(image, None)]
    for step in steps:
        name = step_name(image, step)
        reuse = f"{name}.reuse" if step.reuse else "-"
        lines.append(f"step {step.first} {step.last} {step_tag(image, step)} {volumes.joined(files, name)} {reuse}")
    lines += [f"line {_line(x)}" for x in (*cargo.lines, *([] if cargo.line in cargo.lines else [cargo.line]))]
    for model in _models_beside(cargo, options):
        short = model.set_digest.removeprefix("sha256:")
        lines.append(f"model {short} {sum(f.size_bytes for f in model.files)} {_safe_path(model.name)} {model.license or 'unknown'}")
        lines += [f"mfile {short} {f.size_bytes} {f.sha256} {f.path} {volumes.joined(files, f'models/{short}/{f.path}')}" for f in model.files]
    lines += [f"vol {p} {f.size_bytes} {f.sha256} {f.group}" for p, f in files.items() if f.role in ("part", "model", "headers")]
    lines += [f"parity {p} {f.size_bytes} {f.sha256} {f.group}" for p, f in files.items() if f.role == "parity"]
    return lines


def _line(line: Line) -> str:
    if line.cuda is None:
        return f"{line.name} none 0 0 - - -"
    arches, ptx, compat = ",".join(line.arches), ",".join(line.ptx) or "-", ",".join(map(str, line.compat)) or "-"
    return f"{line.name} {line.cuda} {line.native} {line.floor} {arches} {ptx} {compat}"


def _needs(cargo: Cargo) -> dict[str, Any]:
    layers = cargo.image.layers
    largest = max(sum(layers[k - 1].blob_bytes for k in s.carry) for s in plan_steps(cargo.image, None))
    return {
        "engine": "20.10",
        "platform": cargo.lock.platform,
        "cuda": cargo.line.cuda,
        "driver": cargo.line.floor if cargo.line.cuda else None,
        "architectures": list(cargo.line.arches),
        "disk_bytes_overlay2": sum(x.size_bytes for x in layers) + largest,
        "disk_bytes_containerd": sum(x.size_bytes + x.blob_bytes for x in layers) + largest,
        "model_bytes": sum(f.size_bytes for m in cargo.lock.models if not m.bundled for f in m.files),
        "memory_bytes": cargo.memory_bytes,
    }


def _manifest(cargo: Cargo, files: volumes.Files, options: Options) -> dict[str, Any]:
    image = cargo.image
    return {
        "milktea_bundle": FORMAT,
        "name": cargo.lock.image,
        "id": bundle_id(image),
        "kind": "delta" if options.base else "full",
        "base": options.base.model_dump() if options.base else None,
        "image": {
            "ref": final_tag(image),
            "config_digest": image.config_digest,
            "manifest_digest": image.manifest_digest,
            "layers": [{"name": x.name, "diff_id": x.diff_id, "size_bytes": x.size_bytes, "blob_sha256": x.blob_sha256} for x in image.layers],
        },
        "models": [m.model_dump() for m in _models_beside(cargo, options)],
        "files": {p: {"bytes": f.size_bytes, "sha256": f.sha256, "role": f.role, "parity_group": f.group} for p, f in sorted(files.items())},
    }


def _readme(cargo: Cargo, files: volumes.Files, language: str) -> str:
    text = (SERVER / f"README.{language}.txt").read_text("utf-8")
    facts = {
        "NAME": cargo.lock.image,
        "ID": bundle_id(cargo.image),
        "CUDA": cargo.line.cuda or "-",
        "DRIVER": cargo.line.floor if cargo.line.cuda else "-",
        "DISK": f"{(_needs(cargo)['disk_bytes_overlay2'] + _needs(cargo)['model_bytes']) / 1e9:.1f} GB",
        "VOLUMES": str(sum(f.role in ("part", "model") for f in files.values())),
    }
    return re.sub(r"@([A-Z]+)@", lambda found: facts[found[1]], text)


def _write_sums(files: volumes.Files, folder: Path, options: Options) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{f.sha256}  {path}\n" for path, f in sorted(files.items())))
    if options.key:
        sign.sign(sums, options.key)


def _check_room(cargo: Cargo, options: Options, out: Path) -> None:
    steps = plan_steps(cargo.image, options.base)
    need = sum(cargo.image.layers[k - 1].blob_bytes for s in steps for k in s.carry) + sum(
        f.size_bytes for m in _models_beside(cargo, options) for f in m.files
    )
    need += need // options.parity_members if options.parity_members else 0
    at = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(at).free) < need:
        raise PreflightError(f"the bundle takes {need:,} bytes, {at} has {free:,} free", hint="name a folder on a larger disk")


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _safe_path(path: str) -> str:
    """PLAN is read by a shell: a path of other signs than these would be cut in pieces there."""
    if not re.fullmatch(r"[A-Za-z0-9._/+-]+", path) or ".." in path.split("/") or path.startswith("/"):
        raise ConfigError(f"{path!r} cannot travel in a bundle: letters, digits and . _ / + - only", hint="rename it in the model's folder")
    return path


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
