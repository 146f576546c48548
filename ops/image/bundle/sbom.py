"""The bill of materials of a bundle, CycloneDX 1.6, straight from the lock: exact hashes, no
scanner's guess, no clock.

The same lock gives the same bytes: the serial number is derived from the lock, and there is no
timestamp.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from ops.image.spec.lock import Deb, Lock, Model, Wheel, dumps

_MILKTEA = uuid.UUID("6d696c6b-7465-4100-8000-000000000001")


def cyclonedx(lock: Lock) -> bytes:
    """Every Debian package, wheel and base model with its hash, its package URL and the licence
    that the lock records.
    """
    root = f"pkg:docker/milktea/{lock.image}@{lock.version}"
    components = [
        *map(_deb, lock.debs),
        *(_wheel(w) for w in lock.wheels),
        *map(_model, lock.models),
    ]
    components.sort(key=lambda c: c["bom-ref"])
    version = str(lock.identity.config_digest) if lock.identity else str(lock.version)
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_MILKTEA, dumps(lock))}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": root,
                "name": lock.image,
                "version": version,
            }
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": [c["bom-ref"] for c in components]}],
    }
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def licences(lock: Lock) -> str:
    """One line a component: licence, kind, name, version; sorted. "unknown" means that its metadata
    does not say.
    """
    rows = [(x.license or "unknown", "wheel", x.name, x.version) for x in lock.wheels]
    rows += [(m.license or "unknown", "model", m.name, m.revision) for m in lock.models]
    rows += [
        ("see /usr/share/doc/NAME/copyright in the image", "debian", d.name, d.version)
        for d in lock.debs
    ]
    return "".join(
        f"{licence}\t{kind}\t{name}\t{version}\n" for licence, kind, name, version in sorted(rows)
    )


def source_offer(lock: Lock) -> str:
    """Where the sources of the Debian packages are: GPL and LGPL ask whoever passes on a program to
    say so.
    """
    rows = "".join(
        f"{deb.name} {deb.version}\n" for deb in sorted(lock.debs, key=lambda deb: deb.name)
    )
    return (
        "This bundle holds programs of Debian 12 under the GNU GPL, LGPL and other licences. Each"
        " program's licence is in\nthe image at /usr/share/doc/NAME/copyright. The complete source"
        " of every version below is at\nhttps://snapshot.debian.org/package/NAME/VERSION/. For"
        " three years after you received this bundle, whoever gave\nit to you will on request copy"
        " these sources for you onto a disk, for no more than the cost of doing so.\n\n" + rows
    )


def _deb(deb: Deb) -> dict[str, Any]:
    purl = f"pkg:deb/debian/{deb.name}@{_quoted(deb.version)}?arch={deb.architecture}"
    return _component("library", deb.name, deb.version, purl, deb.sha256, "")


def _wheel(wheel: Wheel) -> dict[str, Any]:
    purl = f"pkg:pypi/{wheel.name.lower().replace('_', '-')}@{_quoted(wheel.version)}"
    return _component("library", wheel.name, wheel.version, purl, wheel.sha256, wheel.license)


def _model(model: Model) -> dict[str, Any]:
    purl = f"pkg:generic/{_quoted(model.name)}@{_quoted(model.revision)}"
    found = _component(
        "machine-learning-model",
        model.name,
        model.revision,
        purl,
        model.set_digest.removeprefix("sha256:"),
        model.license,
    )
    parts = [
        {
            "type": "file",
            "bom-ref": f"{purl}#{f.path}",
            "name": f.path,
            "hashes": [{"alg": "SHA-256", "content": f.sha256}],
        }
        for f in model.files
    ]
    return found | {"components": parts}


def _component(
    kind: str, name: str, version: str, purl: str, sha256: str, licence: str
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": kind,
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    found["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    if licence:
        found["licenses"] = [{"license": {"name": licence}}]
    return found


def _quoted(text: str) -> str:
    """Percent-encoding as package URLs want it in names and versions."""
    return (
        text.replace("%", "%25")
        .replace("+", "%2B")
        .replace("/", "%2F")
        .replace("@", "%40")
        .replace(":", "%3A")
    )
