"""Measures the folder of an update, every file counted; not a test. Needs the fetched wheels of the image.

    python tests/image/measure_updates.py commits IMAGE [N]       after each of the last N commits that changed the trainer
    python tests/image/measure_updates.py wheel IMAGE FILE.whl    after one wheel became another version
"""

from __future__ import annotations

import io
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ops.image import assemble, ship
from ops.image import workflow as build
from ops.image.bundle import bundle
from ops.image.bundle import manifest as papers
from ops.image.bundle import signature as sign
from ops.image.bundle.contents import Cargo, Options
from ops.image.bundle.inventory import Present
from ops.image.fetch.wheels import is_whole, sha256_file, where
from ops.image.spec import lock
from ops.image.spec.paths import Places

HERE = Places()


def checkout(commit: str, root: Path) -> Places:
    """That commit's sources with today's images and this machine's cache."""
    done = subprocess.run(["git", "archive", commit, *assemble.SOURCES], cwd=HERE.root, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(root, filter="data")
    for name in ("images", "docker"):
        shutil.copytree(HERE.root / name, root / name)
    (root / ".milktea").mkdir()
    (root / ".milktea/cache").symlink_to(HERE.cache)
    return Places(root)


def cargo(name: str, places: Places) -> Cargo:
    image, whole = build.assembled(name, places)
    return Cargo(whole, image, {}, ship.line_of(whole.image, whole.cuda), tuple(ship.lines(HERE)))


def update(old: Cargo, new: Cargo, work: Path, key: Path) -> int:
    """Bytes of the folder that brings a server from `old` to `new`, both of the same image and models."""
    held, kept = papers.kept(old), {}
    for digest, data in held.by_hash().items():
        (work / digest).write_bytes(data)
        kept[digest] = work / digest
    kept |= {layer.blob_sha256: layer.path for layer in held.layers.values()}
    models = frozenset(model.set_digest for model in old.lock.models)
    options = Options(base=Present(ref="before", layers=old.image.diff_ids), base_models=models, kept=kept, key=key)
    made = bundle.write_bundle(new, work / "update", options)
    shutil.rmtree(work / "update")
    return made.size_bytes


def commits(name: str, count: int) -> list[int]:
    log = ["git", "log", "--format=%h", f"-{count}", "--no-merges", "HEAD", "--", *assemble.SOURCES]
    found, sizes = subprocess.run(log, cwd=HERE.root, capture_output=True, text=True, check=True).stdout.split(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sign.make_key(work / "key")
        for commit in found:
            pair = []
            for number, side in enumerate((f"{commit}~1", commit)):
                places = checkout(side, work / str(number))
                build.assemble(name, places)
                pair.append(cargo(name, places))
            sizes.append(update(*pair, work, work / "key"))
            print(f"{commit} {sizes[-1]:>8,} bytes", flush=True)
            for number in (0, 1):
                shutil.rmtree(work / str(number))
    within = sum(size <= 64_000 for size in sizes)
    print(f"{name}: {len(sizes)} commits, median {statistics.median(sizes):,.0f}, most {max(sizes):,}, {within} within 64,000")
    return sizes


def wheel(name: str, file: Path) -> float:
    """The folder's bytes over the new wheel's."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sign.make_key(work / "key")
        places = checkout("HEAD", work / "root")
        build.assemble(name, places)
        old = cargo(name, places)
        spec, locked = build.define(name, places), lock.read(places.lock(name))
        new = lock.Wheel(**said(file), sha256=sha256_file(file), size_bytes=file.stat().st_size, layer="", file=file.name)
        target = where(new, places.wheels)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
        assert is_whole(new, places.wheels)
        wheels = assemble.group([new if x.name == new.name else x for x in locked.wheels], spec)
        locked = locked.model_copy(update={"wheels": wheels})
        layer = next(x for x in wheels if x.name == new.name).layer
        content = next(x for x in assemble.contents(locked, spec, places) if x.name == layer)
        made = assemble.identify(content, spec.epoch)
        locked = locked.model_copy(update={"layers": [made if x.name == layer else x for x in locked.layers]})
        lock.write(locked, places.lock(name))
        build.assemble(name, places)
        size = update(old, cargo(name, places), work, work / "key")
    print(f"{name}: {file.name} has {new.size_bytes:,} bytes, the update {size:,} = {size / new.size_bytes:.3f} of it (layer {layer})")
    return size / new.size_bytes


def said(file: Path) -> dict[str, str]:
    from ops.image import wheels

    about = wheels.about(file)
    return {"name": about.name, "version": about.version, "license": about.license}


if __name__ == "__main__":
    what, image, *rest = sys.argv[1:] or ["help", ""]
    if what == "commits":
        commits(image, int(rest[0]) if rest else 20)
    elif what == "wheel" and len(rest) == 1:
        wheel(image, Path(rest[0]))
    else:
        sys.exit(__doc__)
