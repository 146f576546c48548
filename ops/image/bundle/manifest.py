"""The papers of a bundle: what INSTALL.sh follows, what programs read, what people read. All are functions of what is carried."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ops.errors import ConfigError
from ops.image.bundle import archive, sbom, volumes
from ops.image.bundle import signature as sign
from ops.image.bundle.contents import Cargo, Options, models_beside
from ops.image.bundle.parts import Step, bundle_id, final_tag, plan_steps, safe, stair, step_name, step_tag
from ops.image.driver import Line
from ops.image.spec.lock import dumps
from ops.image.update import KEPT_BYTES

SERVER = Path(__file__).parents[1] / "server"
FORMAT = 3
HEAD = "image/head.tar"  # what the last archive begins with: several kilobytes that an update mostly repeats


@dataclass(frozen=True)
class Kept:
    """What the server keeps of this bundle when it has installed it: texts, by path, and small layers."""

    papers: dict[str, bytes]
    layers: dict[str, archive.Layer]
    head: bytes

    def hashes(self) -> dict[str, str]:
        """sha256 (hex) by path."""
        texts = {**self.papers, HEAD: self.head}
        return {path: hashlib.sha256(data).hexdigest() for path, data in texts.items()} | {
            path: layer.blob_sha256 for path, layer in self.layers.items()
        }

    def by_hash(self) -> dict[str, bytes]:
        return {hashlib.sha256(data).hexdigest(): data for data in (*self.papers.values(), self.head)}

    def files(self, without: Collection[str]) -> dict[str, bytes | Path]:
        """What can be rebuilt by a recipe: all but the installer, which must be there to follow one, and the layers (by DiffID)
        that the server has."""
        found: dict[str, bytes | Path] = {**self.papers, HEAD: self.head}
        del found["INSTALL.sh"]
        for path, layer in self.layers.items():
            if layer.diff_id not in without and layer.path is not None and layer.path.is_file():
                found[path] = layer.path
        return found


def kept(cargo: Cargo) -> Kept:
    """The papers that say nothing of how this bundle is cut, and the layers that are small."""
    papers = {
        "INSTALL.sh": "".join(p.read_text("utf-8") for p in sorted((SERVER / "install").glob("[0-9]*.sh"))),
        "sbom/image.cdx.json": sbom.cyclonedx(cargo.lock).decode(),
        "licenses/INDEX.txt": sbom.licences(cargo.lock),
        "tools/milktea-run": (SERVER / "milktea-run.sh").read_text("utf-8"),
        **{f"tools/{name}": text for name, text in tools().items()},
    }
    found = Kept(
        {path: text.encode() for path, text in papers.items()},
        {f"layers/{safe(x.name)}": x for x in cargo.image.layers if x.blob_bytes <= KEPT_BYTES},
        archive.head(replace(cargo.image, tag=final_tag(cargo.image))),
    )
    sizes = {path: len(data) for path, data in found.papers.items()} | {HEAD: len(found.head)}
    sizes |= {path: layer.blob_bytes for path, layer in found.layers.items()}
    rows = "".join(f"{row}\n" for row in facts(cargo, found.hashes(), sizes))
    found = replace(found, papers={"FACTS": rows.encode(), **found.papers})
    lock = dumps(cargo.lock.model_copy(update={"kept": dict(sorted(found.hashes().items()))}))
    return replace(found, papers={**found.papers, "image.lock": lock.encode()})


def changes_name(cargo: Cargo) -> str:
    """Where an update has the bytes that the recipes of layers take; those of papers take theirs from CHANGES."""
    return f"parts/changes-{bundle_id(cargo.image)}.bin"


def update_stub(installer: bytes) -> str:
    """INSTALL.sh of an update, where the server kept the one that is wanted."""
    return (SERVER / "update.sh").read_text("utf-8").replace("@SHA256@", hashlib.sha256(installer).hexdigest())


def tools() -> dict[str, str]:
    """What runs inside the image but is of the bundle: the converter of job files (ops.job.config is in the image), scoring, the
    evidence page."""
    found = {name: (SERVER / name).read_text("utf-8") for name in ("job_from_toml.py", "score.py")}
    return found | {"evidence.py": (SERVER / "audit_report.py").read_text("utf-8")}


def facts(cargo: Cargo, hashes: dict[str, str], sizes: dict[str, int]) -> list[str]:
    """What INSTALL.sh reads and what is true of the image however it is cut, so that an update repeats little of it: one fact a
    line, fields apart by spaces; server/install/10-plan.sh is the reader."""
    image, lock = cargo.image, cargo.lock
    lines = [
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
    lines += [f"evidence {cargo.evidence}"] if cargo.evidence else []
    lines += [f"tool {name}" for name in tools()]
    lines += [f"layer {k} {x.diff_id} {x.size_bytes} {x.blob_sha256} {x.blob_bytes} {safe(x.name)}" for k, x in enumerate(image.layers, 1)]
    lines += [f"full {s.first} {s.last} {step_name(image, s)}" for s in plan_steps(image, None)]
    lines += [f"line {line_row(x)}" for x in (*cargo.lines, *([] if cargo.line in cargo.lines else [cargo.line]))]
    return lines + [f"keep {digest} {sizes[path]} {path}" for path, digest in hashes.items()]


def plan(cargo: Cargo, steps: list[Step], files: volumes.Files, options: Options, held: Kept, headless: bool) -> list[str]:
    """What INSTALL.sh reads of this bundle: what is in it and what the server adds. The rest is in the facts."""
    image = cargo.image
    lines = [
        f"milktea-bundle {FORMAT}",
        f"name {cargo.lock.image}",
        f"id {bundle_id(image)}",
        f"kind {'delta' if options.base else 'full'}",
    ]
    lines += [f"signature {name}" for name in sign.signature_names("SHA256SUMS", options.key)] if options.key else []
    lines += [f"since {options.base.ref}"] if options.base else []
    for word, layers in (("reuse", [k for s in steps for k in s.reuse]), ("rebuilt", [k for s in steps for k in s.rebuilt])):
        lines += [f"{word} {' '.join(map(str, layers))}"] if layers else []
    if changes := [path for path in files if path.startswith(changes_name(cargo))]:
        lines.append(f"changes {','.join(sorted(changes))}")
    for step in steps:
        head = HEAD if headless and step is steps[-1] else "-"
        carried = volumes.joined(files, step_name(image, step)) if step.carry or head == "-" else "-"
        lines.append(f"step {step.first} {step.last} {carried} {head}")
    for model in models_beside(cargo, options):
        short = model.set_digest.removeprefix("sha256:")
        lines.append(f"model {short} {sum(f.size_bytes for f in model.files)} {safe_path(model.name)} {model.license or 'unknown'}")
        lines += [f"mfile {short} {f.size_bytes} {f.sha256} {f.path} {volumes.joined(files, f'models/{short}/{f.path}')}" for f in model.files]
    lines += [f"vol {p} {f.size_bytes} {f.sha256} {f.group} {f.blake2}" for p, f in files.items() if f.role in ("part", "model")]
    lines += [f"parity {p} {f.size_bytes} {f.sha256} {f.group} {f.blake2}" for p, f in files.items() if f.role == "parity"]
    lines += [f"keep {held.hashes()[path]} {len(held.papers[path])} {path}" for path in ("FACTS", "image.lock")]
    return lines + _blob_rows(image, steps, files, held, headless)


def _blob_rows(image: archive.Image, steps: list[Step], files: volumes.Files, held: Kept, headless: bool) -> list[str]:
    """Of what is to be kept and carried in archives: its hash, the volumes, and where in them it begins."""
    rows, small = [], {layer.blob_sha256 for layer in held.layers.values()}
    for step in steps:
        name = step_name(image, step)
        shown = archive.prefix(image, step.last, step_tag(image, step))
        for k, offset in archive.offsets(shown, step.carry, headless and step is steps[-1]).items():
            if (blob := image.layers[k - 1].blob_sha256) in small:
                rows.append(f"blob {blob} {volumes.joined(files, name)} {offset}")
    if steps and not headless:
        rows.append(f"blob {held.hashes()[HEAD]} {volumes.joined(files, step_name(image, steps[-1]))} 0")
    return rows


def line_row(line: Line) -> str:
    if line.cuda is None:
        return f"{line.name} none 0 0 - - -"
    arches, ptx, compat = ",".join(line.arches), ",".join(line.ptx) or "-", ",".join(map(str, line.compat)) or "-"
    return f"{line.name} {line.cuda} {line.native} {line.floor} {arches} {ptx} {compat}"


def needs(cargo: Cargo) -> dict[str, Any]:
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


def manifest(cargo: Cargo, files: volumes.Files, options: Options, held: Kept) -> dict[str, Any]:
    """The bundle for programs; of an update only what the base has not, and no more of its papers than SHA256SUMS says."""
    image, has = cargo.image, set(options.base.layers) if options.base else set()
    return {
        "milktea_bundle": FORMAT,
        "name": cargo.lock.image,
        "id": bundle_id(image),
        "kind": "delta" if options.base else "full",
        "base": options.base.ref if options.base else None,
        "image": {
            "ref": final_tag(image),
            "config_digest": image.config_digest,
            "manifest_digest": image.manifest_digest,
            "layers": [
                {"name": x.name, "diff_id": x.diff_id, "size_bytes": x.size_bytes, "blob_sha256": x.blob_sha256}
                for x in image.layers
                if x.diff_id not in has
            ],
        },
        "models": [m.model_dump() for m in models_beside(cargo, options)],
        "kept": {path: digest for path, digest in held.hashes().items() if not options.base or path == "image.lock"},
        "files": {
            p: {"bytes": f.size_bytes, "role": f.role} | ({} if options.base else {"sha256": f.sha256, "parity_group": f.group})
            for p, f in sorted(files.items())
            if not options.base or f.role != "small"
        },
    }


def readme(cargo: Cargo, files: volumes.Files, options: Options, language: str) -> str:
    text = (SERVER / f"{'UPDATE' if options.base else 'README'}.{language}.txt").read_text("utf-8")
    facts = {
        "BASE": options.base.ref if options.base else "-",
        "NAME": cargo.lock.image,
        "ID": bundle_id(cargo.image),
        "CUDA": cargo.line.cuda or "-",
        "DRIVER": cargo.line.floor if cargo.line.cuda else "-",
        "DISK": f"{(needs(cargo)['disk_bytes_overlay2'] + needs(cargo)['model_bytes']) / 1e9:.1f} GB",
        "VOLUMES": str(sum(f.role in ("part", "model") for f in files.values())),
    }
    return re.sub(r"@([A-Z]+)@", lambda found: facts[found[1]], text)


def safe_path(path: str) -> str:
    """PLAN is read by a shell: a path of other signs than these would be cut in pieces there."""
    if not re.fullmatch(r"[A-Za-z0-9._/+-]+", path) or ".." in path.split("/") or path.startswith("/"):
        raise ConfigError(f"{path!r} cannot travel in a bundle: letters, digits and . _ / + - only", hint="rename it in the model's folder")
    return path


def as_json(value: Any, indent: int | None = 1) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(value, indent=indent, separators=separators, sort_keys=True, ensure_ascii=False) + "\n"
