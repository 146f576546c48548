"""The air gap: one real bundle, damaged, forged and killed, each time refused in the right words
or brought to its end.

    python tests/airgap.py FOLDER [--damages 1000] [--kills 100]

FOLDER keeps the bundles of the practice image (`make image` first), a key and results.jsonl; a
second start goes on behind what is done. Needs root, ssh-keygen, openssl, a Docker engine, and a
free gigabyte.

Damages: seeded; flipped bits, cut, swapped, exchanged, deleted and lengthened files, INSTALL.sh
ended early. Forgeries: each by name, in `forgeries`. Kills: SIGKILL to INSTALL.sh and all that it
started after the n-th line that its shell traces, n over the whole installation (a third of them
of the full bundle, the others of an update); then it is started again.
Exit code 0: nothing was accepted, misnamed or left behind. Last line: the figures.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from airgap_bench import Bench  # noqa: E402
from forgeries import FORGERIES, Refused  # noqa: E402
from image_shell import flip, pinned  # noqa: E402

from ops.hardware.driver import CudaLine  # noqa: E402
from ops.image import workflow  # noqa: E402
from ops.image.build import engine  # noqa: E402
from ops.image.bundle import archive, bundle, parts, signature  # noqa: E402
from ops.image.bundle.contents import Contents, Options  # noqa: E402
from ops.image.bundle.inventory import Present  # noqa: E402

REPOSITORY = "milktea/airgap"
# the self-test has tests of its own; a killed installation must only run one
PROVE = ("python3", "-c", 'print(\'{"milktea_selftest":1,"ok":true,"checks":[]}\')')
SMALL = ("SHA256SUMS", "SHA256SUMS.sig", "SHA256SUMS.openssl")


def changed(contents: Contents, folder: Path) -> Contents:
    """The next release: one more line in the trainer's layer."""
    *lower, top = contents.image.layers
    raw = io.BytesIO(gzip.decompress(top.path.read_bytes()))
    with tarfile.open(fileobj=raw, mode="a") as tar:
        entry = tarfile.TarInfo("opt/airgap-release")
        entry.size, entry.mode = 4, 0o644
        tar.addfile(entry, io.BytesIO(b"two\n"))
    data = raw.getvalue()
    blob = gzip.compress(data, 1, mtime=0)
    name = hashlib.sha256(blob).hexdigest()
    (folder / name).write_bytes(blob)
    made = archive.Layer(top.name, archive.digest(data), name, len(blob), folder / name, len(data))
    config = json.loads(contents.image.config_json_bytes)
    config["rootfs"]["diff_ids"][-1] = made.diff_id
    image = archive.Image(archive.canonical_json(config), (*lower, made), contents.image.tag)
    return replace(contents, image=image)


def prepare(folder: Path) -> Bench:
    """The practice image under a name of its own, as a full bundle and as the update after it."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "key"
    if not key.exists():
        signature.make_key(key)
        signature.make_key(folder / "stranger")
    image, lock = workflow.take("practice")
    lock = lock.model_copy(update={"image": "airgap"})
    image = replace(image, tag=f"{REPOSITORY}:1")
    full = Contents(lock, image, {}, CudaLine("airgap", None), prove=PROVE, python="python3")
    after = changed(full, folder)
    if not (folder / "update").exists():
        shutil.rmtree(folder / "full", ignore_errors=True)
        bundle.write_bundle(full, folder / "full", Options(release=7, key=key))
        base = Present(parts.final_tag(image), image.diff_ids)
        bundle.write_bundle(after, folder / "update", Options(release=8, base=base, key=key))
    return Bench(folder, full, after)


# -- damages -----------------------------------------------------------------------------------


def damage(at: Path, other: Path, dice: random.Random) -> tuple[str, set[str]]:
    """Spoil a bundle in one way; returns how, and the files of which one must be named."""
    files = sorted(path for path in at.rglob("*") if path.is_file())
    kind = dice.choice(["flip", "flip", "cut", "swap", "exchange", "delete", "longer", "installer"])
    file = at / "INSTALL.sh" if kind == "installer" else dice.choice(files)
    name, size = str(file.relative_to(at)), file.stat().st_size
    if kind == "flip":
        flip(file, dice.randrange(size), dice.randrange(8))
    elif kind in ("cut", "installer"):
        kept = file.read_bytes()[: dice.randrange(size)]
        file.unlink()
        file.write_bytes(kept)
    elif kind == "longer":
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data + dice.randbytes(dice.randrange(1, 2000)))
    elif kind == "exchange":  # with the file of the release before or after
        there = [f for f in files if (twin := other / f.relative_to(at)).is_file() if
                 twin.read_bytes() != f.read_bytes()]  # fmt: skip
        file = dice.choice(there)
        name = str(file.relative_to(at))
        file.unlink()
        shutil.copyfile(other / name, file)
    elif kind == "swap":
        second = dice.choice([f for f in files if f.read_bytes() != file.read_bytes()])
        file.rename(at / "swap")
        second.rename(file)
        (at / "swap").rename(second)
        return f"swap {name}", {name, str(second.relative_to(at))}
    else:
        file.unlink()
    return f"{kind} {name}", {name}


def one_damage(bench: Bench, seed: int) -> tuple[str, str]:
    """(what was done, what was wrong with the answer: empty where nothing was)."""
    dice = random.Random(seed)
    kind = "full" if seed % 5 == 0 else "update"
    at = bench.copy(kind)
    how, names = damage(at, bench.folder / ("full" if kind == "update" else "update"), dice)
    checked = bench.readme(at) if "INSTALL.sh" in names else None
    code, said = bench.run(at, "verify")
    how = f"{kind}: {how}"
    if code == 0:
        return how, f"accepted: {said}"
    if checked is not None:  # a spoiled script says no in its own way; the README's lines name it
        return how, "" if "INSTALL.sh" in checked else f"README's lines said: {checked}"
    if names <= set(SMALL):
        named = any(word in said for word in ("signature", "SHA256SUMS", "damaged"))
    else:
        named = any(name in said for name in names) or "wrong signature" in said
    remedy = re.search(r"do this: (copy|do not install it|ask the sender)", said)
    return how, "" if named and remedy else f"code {code}, not named: {said}"


# -- forgeries ---------------------------------------------------------------------------------


def one_forgery(bench: Bench, number: int) -> tuple[str, str]:
    name, forge = FORGERIES[number]
    at = bench.copy("full" if "image" in name else "update")
    try:
        forge(bench, at)
    except Refused as wrong:
        return name, str(wrong)
    return name, ""


# -- kills -------------------------------------------------------------------------------------


def traced(bench: Bench, at: Path, prefix: Path, lines: int | None) -> int:
    """Install with a tracing shell, killed after so many traced lines; returns the lines there
    were."""
    command = ["unshare", "-n", "sh", "-x", str(at / "INSTALL.sh"), "--prefix", str(prefix)]
    process = subprocess.Popen(
        [*command, "--key", bench.fingerprint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    seen = 0
    for _ in process.stderr:
        seen += 1
        if seen == lines:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lines is not None or process.returncode == 0, "the installation that nobody kills"
    return seen


def one_kill(bench: Bench, number: int, kills: int) -> tuple[str, str]:
    """Kill an installation at one place, start it again; says where, and what is wrong then."""
    fulls = kills // 3
    kind, n, total = (
        ("full", number, fulls) if number < fulls else ("update", number - fulls, kills - fulls)
    )
    prefix = bench.folder / "prefix"
    bench.ready(kind, prefix)
    if kind not in bench.lines:
        bench.lines[kind] = traced(bench, bench.folder / kind, prefix, None)
        bench.ready(kind, prefix)
    place = (n * 2 + 1) * bench.lines[kind] // (total * 2)
    traced(bench, bench.folder / kind, prefix, place)
    code, said = bench.run(bench.folder / kind, "install", prefix=prefix)
    wrong = [] if code == 0 else [f"exit {code}: {said}"]
    wrong += bench.leftovers(prefix, bench.full if kind == "full" else bench.after)
    return f"{kind}: killed at line {place} of {bench.lines[kind]}", "; ".join(wrong)


# -- all of it ---------------------------------------------------------------------------------


def trials(bench: Bench, damages: int, kills: int) -> Iterator[tuple[str, Callable[[], tuple]]]:
    pinned_at = bench.folder / "pinned"
    if not pinned_at.exists():
        pinned(pinned_at, bench.key, pem=True)
    for seed in range(damages):
        yield f"damage {seed}", lambda seed=seed: one_damage(bench, seed)
    for number in range(len(FORGERIES)):
        yield f"forgery {number}", lambda number=number: one_forgery(bench, number)
    # the updates first, and places from all over: a cut-off proof says something of each
    order = random.Random(1).sample(range(kills), kills)
    for number in sorted(order, key=lambda number: number < kills // 3):
        yield f"kill {number}", lambda number=number: one_kill(bench, number, kills)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    engine.connect().close()
    bench = prepare(options.folder.resolve())
    results = bench.folder / "results.jsonl"
    done = {}
    if results.exists():
        done = {row["trial"]: row for row in map(json.loads, results.read_text().splitlines())}
    with results.open("a") as out:
        for trial, act in trials(bench, options.damages, options.kills):
            if trial in done:
                continue
            began = time.monotonic()
            what, wrong = act()
            done[trial] = {
                "trial": trial,
                "what": what,
                "wrong": wrong[:3000],
                "seconds": round(time.monotonic() - began, 2),
            }
            out.write(json.dumps(done[trial]) + "\n")
            out.flush()
            if wrong:
                print(f"WRONG {trial}: {what}: {wrong[:1500]}", flush=True)
    bench.clean()
    counts = Counter(trial.split()[0] for trial in done)
    bad = Counter(trial.split()[0] for trial, row in done.items() if row["wrong"])
    print(
        ", ".join(f"{counts[kind]} {kind}s ({bad[kind]} wrong)" for kind in counts),
        f"in {sum(row['seconds'] for row in done.values()):,.0f} s",
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
