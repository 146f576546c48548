"""What INSTALL.sh does once the image is loaded and verified, by that image's own Python: no
network, read-only, no rights.

    python installer.py models PREFIX < GOOD     base models from the volumes into PREFIX/models
    python installer.py tools PREFIX             tools, docs, the lock, milktea-run into PREFIX
    python installer.py record PREFIX < FACTS    INSTALL-RECORD.json and EVIDENCE.html

GOOD has a line "VOLUME PATH" for each verified volume. FACTS are the server's facts as lines, then
"selftest" and what the self-test printed. The bundle's small files lie under /small
(MILKTEA_SMALL). Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import audit_report  # lies beside this file

CHUNK = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
SET = re.compile("[0-9a-f]{64}")
FILE = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)*")


class Damaged(Exception):
    """A file that is not what the signed plan says; the text names it."""


def rows(plan: str, key: str) -> list[list[str]]:
    """The fields of every line of PLAN that begins with ``key``."""
    return [line.split(" ")[1:] for line in plan.splitlines() if line.startswith(f"{key} ")]


def install_models(plan: str, places: dict[str, Path], prefix: Path) -> list[str]:
    """Copy each model of PLAN to PREFIX/models/SET, hashing what is written; a model appears whole
    or not at all.

    Returns a line for each. Raises Damaged where a file does not arrive as the plan says.
    """
    said = []
    files = rows(plan, "mfile")
    for digest, size, name, _licence in rows(plan, "model"):
        if not SET.fullmatch(digest) or not NAME.fullmatch(name):
            raise Damaged(f"the plan names no model: {name} {digest}")
        target = prefix / "models" / digest
        if target.is_dir():
            said.append(f"model {name} is here already")
        else:
            _copy_model([row[1:] for row in files if row[0] == digest], places, target)
            said.append(f"model {name}: {int(size):,} bytes")
        _link_name(prefix / "models", name, digest)
    return said


def _copy_model(files: list[list[str]], places: dict[str, Path], target: Path) -> None:
    stage = target.with_name(f".part-{target.name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for size, sha256, path, volumes in files:
        if not FILE.fullmatch(path):
            raise Damaged(f"the plan names no file: {path}")
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        found, written = _copy_file([places[volume] for volume in volumes.split(",")], stage / path)
        if found != sha256 or written != int(size):
            raise Damaged(
                f"{path} arrived with {written:,} bytes and sha256 {found[:12]}, the plan says"
                f" {size} and {sha256[:12]}"
            )
    for entry in stage.rglob("*"):
        entry.chmod(0o755 if entry.is_dir() else 0o444)
    stage.rename(target)


def _copy_file(volumes: Iterable[Path], target: Path) -> tuple[str, int]:
    """sha256 (hex) and bytes of what was written and synced."""
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as out:
        for volume in volumes:
            with volume.open("rb") as content:
                while piece := content.read(CHUNK):
                    digest.update(piece)
                    written += out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest(), written


def _link_name(models: Path, name: str, digest: str) -> None:
    """by-name/NAME points to the set, relatively, so that the folder may be moved."""
    link = models / "by-name" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(models / digest, link.parent))
    new.replace(link)


def install_tools(plan: str, small: Path, prefix: Path) -> None:
    """Copy the bundle's tools, docs and lock; a folder is replaced by one rename, a file too. An
    image that is gone back to finds its own tools and lock among the records.
    """
    [[identity]] = rows(plan, "id")
    own = f"records/tools-{identity}"
    for name, target in (("tools", "tools"), ("tools", own), ("docs", "docs")):
        new, old = prefix / f"{target}.new", prefix / f"{target}.old"
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        if (small / name).is_dir():
            shutil.copytree(small / name, new)
            if (prefix / target).is_dir():
                (prefix / target).rename(old)
            new.rename(prefix / target)
            shutil.rmtree(old, ignore_errors=True)
    for source, target, mode in (
        ("image.lock", f"records/image-{identity}.lock", 0o644),
        ("tools/milktea-run", "bin/milktea-run", 0o755),
    ):
        part = prefix / f"{target}.part"
        part.parent.mkdir(exist_ok=True)
        shutil.copyfile(small / source, part)
        part.chmod(mode)
        part.replace(prefix / target)


def record(plan: str, facts: str, sbom: str | None) -> dict[str, Any]:
    """What was verified, proved and installed, as one object: who, when, which hashes, the checks,
    the self-test.
    """
    head, _, selftest = facts.partition("\nselftest\n")
    lines = [line.partition(" ") for line in head.splitlines()]
    fact = {key: value for key, _, value in lines}
    single = {line.split(" ")[0]: line.partition(" ")[2] for line in plan.splitlines()}
    checks = [value.split("|", 4) for key, _, value in lines if key == "check"]
    return {
        "milktea_install": 1,
        "when": fact["when"],
        "who": fact["who"],
        "server": fact["server"],
        "forced": bool(fact.get("forced")),
        "bundle": {
            "name": single["name"],
            "id": single["id"],
            "kind": single["kind"],
            "release": int(single["release"]),
            "sha256sums": fact["sums"],
            "signature": fact["signature"],
            "volumes_verified": int(fact["volumes"]),
        },
        "image": {
            "ref": fact["ref"],
            "id": fact["id"],
            "previous": fact.get("previous", ""),
            "layers": [row[1] for row in rows(plan, "layer")],
        },
        "sbom": sbom,
        "engine": fact["engine"],
        "store": fact.get("store", ""),
        "kernel": fact.get("kernel", ""),
        "gpus": [value for key, _, value in lines if key == "gpu"],
        "preflight": {
            "checks": [
                dict(zip(("check", "verdict", "measured", "needed", "remedy"), c, strict=True))
                for c in checks
            ]
        },
        "selftest": _json_or_text(selftest),
    }


def write_record(found: dict[str, Any], prefix: Path) -> None:
    """INSTALL-RECORD.json, its copy under records/, EVIDENCE.html; each appears whole. Of a bundle
    of models only the copy.
    """
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (prefix / "records").mkdir(exist_ok=True)
    name = f"INSTALL-{found['bundle']['id']}-{found['when'].replace(':', '')}.json"
    contents = {prefix / "records" / name: text}
    if found["bundle"]["kind"] != "models":  # what was proved of the image stays what it is
        contents[prefix / "INSTALL-RECORD.json"] = text
        contents[prefix / "EVIDENCE.html"] = audit_report.page(text)
    for path, content in contents.items():
        part = path.with_name(path.name + ".part")
        part.write_text(content, "utf-8")
        part.replace(path)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text[:2000]


def main(arguments: list[str]) -> int:
    small = Path(os.environ.get("MILKTEA_SMALL", "/small"))
    plan = (small / "PLAN").read_text()
    command, prefix = arguments[0], Path(arguments[1])
    if command == "models":
        places = {
            volume: Path(path)
            for volume, _, path in (line.rstrip("\n").partition(" ") for line in sys.stdin)
        }
        try:
            print(*install_models(plan, places, prefix), sep="\n")
        except (Damaged, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    elif command == "tools":
        install_tools(plan, small, prefix)
    elif command == "record":
        sbom = small / "sbom" / "image.cdx.json"
        digest = hashlib.sha256(sbom.read_bytes()).hexdigest() if sbom.is_file() else None
        facts = sys.stdin.buffer.read().decode("utf-8", "replace")  # a folder may be named in GBK
        write_record(record(plan, facts, digest), prefix)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
