"""The bill of materials of a bundle, CycloneDX 1.6, straight from the lock: exact hashes, no
scanner's guess.

The same lock gives the same bytes: serial number and time are the lock's.
"""

from __future__ import annotations

import datetime
import uuid

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from ops.image.spec.lock import Lock, dumps

_MILKTEA = uuid.UUID("6d696c6b-7465-4100-8000-000000000001")


def cyclonedx(lock: Lock) -> bytes:
    """Every Debian package, wheel and base model with its hash, its package URL and the licence
    that the lock records.
    """
    found = [
        _component(
            PackageURL("deb", "debian", x.name, x.version, {"arch": x.architecture}), x.sha256
        )
        for x in lock.debs
    ]
    found += [
        _component(PackageURL("pypi", None, x.name, x.version), x.sha256, x.license)
        for x in lock.wheels
    ]
    for model in lock.models:
        purl = PackageURL("generic", None, model.name, model.revision)
        made = _component(purl, model.set_digest.removeprefix("sha256:"), model.license)
        made.type = ComponentType.MACHINE_LEARNING_MODEL
        made.components = [
            Component(
                type=ComponentType.FILE,
                name=file.path,
                bom_ref=f"{purl}#{file.path}",
                hashes=[_hash(file.sha256)],
            )
            for file in model.files
        ]
        found.append(made)
    identity = lock.identity.config_digest if lock.identity else str(lock.version)
    root = Component(
        type=ComponentType.CONTAINER, name=lock.image, version=identity, bom_ref="image"
    )
    when = datetime.datetime.fromtimestamp(lock.epoch, datetime.UTC)
    bom = Bom(
        components=found,
        serial_number=uuid.uuid5(_MILKTEA, dumps(lock)),
        metadata=BomMetaData(component=root, timestamp=when),
    )
    bom.register_dependency(root, found)
    return (JsonV1Dot6(bom).output_as_string(indent=1) + "\n").encode()


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


def _component(purl: PackageURL, sha256: str, licence: str = "") -> Component:
    return Component(
        name=purl.name,
        version=purl.version,
        purl=purl,
        bom_ref=purl.to_string(),
        hashes=[_hash(sha256)],
        licenses=[DisjunctiveLicense(name=licence)] if licence else [],
    )


def _hash(sha256: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=sha256)
