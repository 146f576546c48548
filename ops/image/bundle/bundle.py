"""A bundle: a folder that explains itself and brings an image, its base models and an installer to a server without a network.

    INSTALL.sh  README.{en,zh}.txt      what to run, what to read
    PLAN  FACTS                         what INSTALL.sh follows, one fact a line (a shell cannot read JSON): of this bundle, of its image
    MANIFEST.json                       the same for programs: every file, its hash, its role, the layers
    SHA256SUMS  .sig  .openssl  keys/   one line a file; the signature is over this
    parts/NN-NAME-HASH.tar[.vNNN]       plain `docker load` archives: one large layer each, or a run of small ones
    models/SET/...  parity/P.NN  sbom/  licenses/  tools/  image.lock
    RECIPES  CHANGES  parts/changes-ID.bin   of an update: how the server makes new files of those that it kept (ops/image/update.py)

An update (``base``) carries the layers that the base lacks; of a small layer, and of the papers, only what changed. Where a
changed layer lies under unchanged ones, the overlay2 store needs those again: INSTALL.sh takes them from what it kept, or
from the image on the server.
The same inputs give the same bytes, but for the signature: ECDSA draws a random number.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ops.errors import ConfigError, PreflightError
from ops.image import parity
from ops.image import update as updates
from ops.image.bundle import archive, volumes
from ops.image.bundle import manifest as papers
from ops.image.bundle import signature as sign
from ops.image.bundle.contents import Cargo, Options, models_beside
from ops.image.bundle.manifest import Kept
from ops.image.bundle.parts import Step, bundle_id, plan_steps, safe, step_name, step_tag
from ops.image.update import NOTHING, Update

FEW = 4  # volumes: an update is small, and parity over fewer would cost more than a quarter of it


@dataclass(frozen=True)
class Bundle:
    folder: Path
    id: str
    kind: str
    size_bytes: int
    carried_layers: int


def write_bundle(cargo: Cargo, out: Path, options: Options = Options(), progress: Callable[[str], None] = lambda _: None) -> Bundle:
    """Write the bundle into `out`, which must be empty or absent; it appears whole (a folder `out`.part is renamed).

    Raises ConfigError for an `out` that holds something, PreflightError for a missing layer or model file, or no room.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint=f"rm -r {out}, or name another folder")
    held = papers.kept(cargo)
    update = updates.plan(held.files(without=options.base.layers), options.kept) if options.base else NOTHING
    rebuilt = [k for k, x in enumerate(cargo.image.layers, 1) if f"layers/{safe(x.name)}" in update.made]
    steps = plan_steps(cargo.image, options.base, rebuilt)
    _check_room(cargo, steps, options, out)
    folder = out.with_name(out.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    progress(f"writing {len(steps)} archives")
    files = _write_parts(cargo, steps, folder, options, papers.HEAD in update.made)
    if update.layers:
        with volumes.Writer(folder, papers.changes_name(cargo), options.volume_bytes, role="part") as changes:
            changes.write(update.layers)
        files |= changes.files
    files |= _write_models(cargo, folder, options)
    files |= _write_parity(files, folder, options)
    _write_papers(cargo, steps, files, folder, options, held, update)
    _write_sums(files, folder, options)
    if out.exists():
        out.rmdir()
    folder.rename(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return Bundle(out, bundle_id(cargo.image), "delta" if options.base else "full", size, sum(len(s.carry) + len(s.rebuilt) for s in steps))


def _write_parts(cargo: Cargo, steps: list[Step], folder: Path, options: Options, headless: bool) -> volumes.Files:
    """Two threads: hashing releases the interpreter, and layers are big. ``headless``: the server makes the last one's head, and
    all of it where it makes the layers too."""
    (folder / "parts").mkdir()

    def one(step: Step) -> volumes.Files:
        name = step_name(cargo.image, step)
        shown = archive.prefix(cargo.image, step.last, step_tag(cargo.image, step))
        with volumes.Writer(folder, name, options.volume_bytes, role="part") as out:
            try:
                archive.write_archive(shown, out, carry=step.carry, headless=headless and step is steps[-1])  # type: ignore[arg-type]
            except OSError as error:
                raise PreflightError(f"{name}: {error}", hint=f"make image IMAGE={cargo.lock.image}") from error
        return out.files

    with ThreadPoolExecutor(2) as pool:
        return volumes.merge(pool.map(one, [s for s in steps if s.carry or not headless or s is not steps[-1]]))


def _write_models(cargo: Cargo, folder: Path, options: Options) -> volumes.Files:
    found: volumes.Files = {}
    for model in models_beside(cargo, options):
        source = cargo.models.get(model.name)
        for file in model.files:
            path = source / file.path if source else None
            if path is None or not path.is_file():
                raise PreflightError(f"model {model.name}: {file.path} is missing", hint=f"milktea image fetch {cargo.lock.image}")
            name = f"models/{model.set_digest.removeprefix('sha256:')}/{papers.safe_path(file.path)}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with volumes.Writer(folder, name, options.volume_bytes, role="model") as out, path.open("rb") as content:
                shutil.copyfileobj(content, out, 1 << 20)
            if out.sha256 != file.sha256:
                hint = f"milktea image fetch {cargo.lock.image} brings it again"
                raise PreflightError(f"model {model.name}: {file.path} is not the file of the lock (half downloaded, or changed)", hint=hint)
            found |= out.files
    return found


def _write_parity(files: volumes.Files, folder: Path, options: Options) -> volumes.Files:
    if not options.parity_members:
        return {}
    sizes = {path: f.size_bytes for path, f in files.items()}
    found: volumes.Files = {}
    for group in parity.groups(sizes, options.parity_members):
        if options.base and len(group.members) < FEW:
            continue
        (folder / "parity").mkdir(exist_ok=True)
        name = f"parity/P.{group.name}"
        digests = parity.xor_files([folder / m for m in group.members], group.size_bytes, folder / name)
        found[name] = digests.file(group.size_bytes, "parity", group.name)
        for member in group.members:
            files[member] = replace(files[member], group=group.name)
    return found


def _write_papers(
    cargo: Cargo, steps: list[Step], files: volumes.Files, folder: Path, options: Options, held: Kept, update: Update
) -> None:
    """The files that explain and install; in no parity group, because one must read them to use parity."""
    texts = {path: data for path, data in held.papers.items() if path not in update.made}
    if options.base and updates.has(options.kept, held.papers["INSTALL.sh"]):
        texts["INSTALL.sh"] = papers.update_stub(held.papers["INSTALL.sh"]).encode()
    if update.recipes:
        texts["RECIPES"] = update.text().encode()
    if update.papers:
        texts["CHANGES"] = update.papers
    texts["PLAN"] = "".join(line + "\n" for line in papers.plan(cargo, steps, files, options, held, papers.HEAD in update.made)).encode()
    if not options.base:
        texts["preflight.json"] = papers.as_json(papers.needs(cargo)).encode()
    texts |= {f"README.{x}.txt": papers.readme(cargo, files, options, x).encode() for x in ("en", "zh")}
    texts |= {f"keys/{name}": data for name, data in (sign.public_files(options.key) if options.key else {}).items()}
    for name, data in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files |= volumes.write_small(folder, name, data, role="small")
    (folder / "INSTALL.sh").chmod(0o755)
    manifest = papers.as_json(papers.manifest(cargo, files, options, held), indent=None if options.base else 1)
    files |= volumes.write_small(folder, "MANIFEST.json", manifest.encode(), role="small")


def _write_sums(files: volumes.Files, folder: Path, options: Options) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{f.sha256}  {path}\n" for path, f in sorted(files.items())))
    if options.key:
        sign.sign(sums, options.key)


def _check_room(cargo: Cargo, steps: list[Step], options: Options, out: Path) -> None:
    need = sum(cargo.image.layers[k - 1].blob_bytes for s in steps for k in s.carry) + sum(
        f.size_bytes for m in models_beside(cargo, options) for f in m.files
    )
    need += need // options.parity_members if options.parity_members else 0
    at = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(at).free) < need:
        raise PreflightError(f"the bundle takes {need:,} bytes, {at} has {free:,} free", hint="name a folder on a larger disk")
