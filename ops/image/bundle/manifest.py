"""The small files of a bundle: PLAN, which INSTALL.sh follows, and what people read.
Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ops.hardware import driver
from ops.hardware.driver import CudaLine, Verdict
from ops.image.bundle import sbom, signature, volumes
from ops.image.bundle.archive import Image
from ops.image.bundle.contents import Contents, Options, models_beside
from ops.image.bundle.parts import (
    Part,
    bundle_id,
    final_tag,
    intermediate_tag,
    part_name,
    plan_parts,
    safe,
)
from ops.image.spec.lock import dumps
from ops.image.spec.paths import safe_path

SERVER = Path(__file__).parents[1] / "server"
FORMAT = 5
TOOLS = ("installer.py", "audit_report.py", "job_from_toml.py", "run_job.py")


def small_files(contents: Contents) -> dict[str, bytes]:
    """The files that do not depend on how the bundle is split, by path."""
    texts = {
        "INSTALL.sh": (SERVER / "INSTALL.sh").read_text("utf-8"),
        "image.lock": dumps(contents.lock),
        "sbom/image.cdx.json": sbom.cyclonedx(contents.lock).decode(),
        "licenses/INDEX.txt": sbom.licences(contents.lock),
        "licenses/SOURCES.txt": sbom.source_offer(contents.lock) if contents.image.layers else "",
        "tools/milktea-run": (SERVER / "milktea-run.sh").read_text("utf-8"),
        **{f"tools/{name}": (SERVER / name).read_text("utf-8") for name in TOOLS},
    }
    found = {path: text.encode() for path, text in texts.items() if text}
    documents = contents.documents or {}
    return found | {f"docs/{name}": path.read_bytes() for name, path in sorted(documents.items())}


def kind(contents: Contents, options: Options) -> str:
    """models (without an image), update (above the layers that the server has), or full."""
    return "models" if not contents.image.layers else "update" if options.base else "full"


def plan(
    contents: Contents, parts: list[Part], files: volumes.Files, options: Options
) -> list[str]:
    """What INSTALL.sh reads: one fact a line, fields apart by spaces."""
    image, lock = contents.image, contents.lock
    lines = [
        f"milktea-bundle {FORMAT}",
        f"name {lock.image}",
        f"id {bundle_id(image)}",
        f"release {options.release}",
        f"kind {kind(contents, options)}",
        f"ref {final_tag(image)}",
        f"intermediate {intermediate_tag(image)}",
        f"config {image.config_digest}",
        f"manifest {image.manifest_digest}",
        f"wire {lock.wire}",
        f"platform {lock.platform.rpartition('/')[2]}",
        f"cuda {contents.line.cuda or 'none'}",
        f"driver {contents.line.floor}",
        f"files {max(1000, sum(x.size_bytes for x in image.layers) // 40_000)}",
        f"memory_bytes {contents.memory_bytes}",
        f"prove {' '.join(contents.prove)}",
        f"python {contents.python}",
    ]
    lines += (
        [f"signature {name}" for name in signature.signature_names("SHA256SUMS", options.key)]
        if options.key
        else []
    )
    lines += [f"since {options.base.ref}"] if options.base else []
    lines += [
        f"layer {k} {x.diff_id} {x.size_bytes} {x.blob_bytes} {safe(x.name)}"
        for k, x in enumerate(image.layers, 1)
    ]
    lines += [
        f"part {p.first} {p.last} {volumes.joined(files, part_name(image, p))}" for p in parts
    ]
    for model in models_beside(contents, options):
        short = model.set_digest.removeprefix("sha256:")
        size = sum(file.size_bytes for file in model.files)
        lines.append(
            f"model {short} {size} {safe_path(model.name)} {safe(model.license) or 'unknown'}"
        )
        lines += [
            f"mfile {short} {f.size_bytes} {f.sha256} {f.path}"
            f" {volumes.joined(files, f'models/{short}/{f.path}')}"
            for f in model.files
        ]
    for start in range(len(image.layers) + 1):
        plain, containerd = room(image, parts, start)
        lines.append(f"room-{start} {plain} {containerd}")
    if contents.line.cuda:
        own = [] if contents.line in contents.lines else [contents.line]
        lines += gpu_rows(contents.line, [*contents.lines, *own])
    return lines + [
        f"vol {p} {f.size_bytes} {f.sha256}" for p, f in files.items() if f.role != "small"
    ]


def readme(contents: Contents, files: volumes.Files, options: Options, language: str) -> str:
    """README.LANGUAGE.txt; of a bundle without a signature it names no key."""
    text = (SERVER / f"README.{language}.txt").read_text("utf-8")
    wanted = {
        "signed": bool(options.key),
        "image": bool(contents.image.layers),
        "models": not contents.image.layers,
        "unsigned": not options.key,
        "update": bool(options.base),
    }
    text = re.sub(
        r"^\[(\w+)\]\n(.*?)^\[/\1\]\n",
        lambda found: found[2] if wanted[found[1]] else "",
        text,
        flags=re.M | re.S,
    )
    disk, _ = room(contents.image, plan_parts(contents.image, None), 0)
    disk += sum(file.size_bytes for model in contents.lock.models for file in model.files)
    facts = {
        "BASE": options.base.ref if options.base else "-",
        "NAME": contents.lock.image,
        "ID": bundle_id(contents.image),
        "CUDA": contents.line.cuda or "-",
        "DRIVER": contents.line.floor if contents.line.cuda else "-",
        "DISK": f"{disk / 1e9:.1f} GB",
        "VOLUMES": str(sum(f.role != "small" for f in files.values())),
    }
    return re.sub(r"@([A-Z]+)@", lambda found: facts[found[1]], text)


def gpu_rows(line: CudaLine, lines: Iterable[CudaLine]) -> list[str]:
    """CAP CLASS FLOOR VERDICT REMEDY for INSTALL.sh's judge: of one capability and class the rows
    run from the newest drivers, of which FLOOR is the oldest, to the oldest. CLASS is datacenter,
    other or any.
    """
    lines = tuple(lines)
    floors = driver.turning_points(lines)
    rows = []
    for capability in driver.CAPABILITIES:
        answers = {
            name: _merged([driver.judge(x, capability, data, line, lines) for x in floors], floors)
            for name, data in (("datacenter", True), ("other", False))
        }
        if answers["datacenter"] == answers["other"]:
            answers = {"any": answers["other"]}
        rows += [
            f"gpu {capability} {name} {floor} {answer.kind} {answer.remedy}"
            for name, found in answers.items()
            for floor, answer in found
        ]
    return rows


def _merged(answers: list[Verdict], floors: list[str]) -> list[tuple[str, Verdict]]:
    """Neighbours with one answer are one row, by the lowest of their floors."""
    return [
        (floor, answer)
        for floor, answer, below in zip(floors, answers, [*answers[1:], None], strict=True)
        if answer != below
    ]


def room(image: Image, parts: list[Part], start: int) -> tuple[int, int]:
    """Bytes to load the parts above the lowest ``start`` layers, with the largest part while it is
    unpacked: on the classic store, and on containerd's, which keeps the gzip blobs.
    """
    held = [[image.layers[k - 1] for k in part.carried] for part in parts if part.last > start]
    peak = max((sum(x.blob_bytes for x in layers) for layers in held), default=0)
    plain = peak + sum(x.size_bytes for layers in held for x in layers)
    return plain, plain + sum(x.blob_bytes for layers in held for x in layers)
