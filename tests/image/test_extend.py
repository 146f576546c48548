"""The three-liners of docs/airgap.md that make the image one's own, typed as they stand there: each
is built, works without a network, and is carried. They need the practice image in the engine.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_world import forget
from machine import needs

from ops.errors import MilkteaError
from ops.image import carry, workflow
from ops.image.build import engine

pytestmark = [pytest.mark.docker, pytest.mark.slow]
DOCUMENT = (Path(__file__).parents[2] / "docs/airgap.md").read_text()
HOST_CERTIFICATES = Path("/usr/local/share/ca-certificates")


def three_liner(word: str) -> list[str]:
    """The lines of the one block of the document that has this word."""
    blocks = re.findall(r"(?:^    .*\n)+", DOCUMENT, re.MULTILINE)
    [found] = [block for block in blocks if word in block]
    return [line.removeprefix("    ") for line in found.splitlines()]


@pytest.fixture
def made() -> Iterator[list[str]]:
    """Tags to remove afterwards; the practice image must be there."""
    try:
        client = engine.connect()
        engine.image_id(client, workflow.define("practice").tag)
    except MilkteaError as error:
        pytest.skip(f"{error} ({error.hint})")
    tags: list[str] = []
    yield tags
    for tag in tags:
        forget(client, tag)


def docker(*words: str, **more: str) -> str:
    done = subprocess.run(
        [engine.docker_with_buildkit(), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return str(done.stdout)


def build(lines: list[str], tag: str, folder: Path, made: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    docker("build", "--tag", tag, str(folder))
    made.append(tag)
    return tag


def inside(tag: str, code: str) -> str:
    return docker("run", "--rm", "--network=none", "--entrypoint=python3", tag, "-c", code).strip()


def carried(tag: str, out: Path) -> list[str]:
    """The names of the layers in the bundle of this image."""
    carry.bundle("practice", out, image=tag, signed=False, proved=False)
    rows = [line.split() for line in (out / "PLAN").read_text().splitlines()]
    assert ["name", workflow.name_of(tag)] in rows
    return [row[5] for row in rows if row[0] == "layer"]


def with_certificates(certificates: bytes, folder: Path, made: list[str]) -> str:
    folder.mkdir()
    (folder / "company.crt").write_bytes(certificates)
    return build(three_liner("update-ca-certificates"), f"mine-{folder.name}:1", folder, made)


def connected(tmp_path: Path, made: list[str]) -> str:
    """Ours; on a machine whose way to the network has certificates of its own, with these."""
    own = sorted(HOST_CERTIFICATES.glob("*.crt"))
    tag = workflow.define("practice").tag
    for number, path in enumerate(own):
        lines = [f"FROM {tag}", *three_liner("update-ca-certificates")[1:]]
        folder = tmp_path / f"host-{number}"
        folder.mkdir()
        (folder / "company.crt").write_bytes(path.read_bytes())
        lines[1] = lines[1].rstrip() + f"host-{number}.crt"
        tag = build(lines, f"mine-host-{number}:1", folder, made)
    return tag


def test_a_company_certificate(tmp_path: Path, made: list[str]) -> None:
    needs("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "company.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=A Company", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    tag = with_certificates(certificate.read_bytes(), tmp_path / "certificate", made)
    code = (
        "import ssl; found = ssl.create_default_context().get_ca_certs();"
        "print(any('A Company' in str(x['subject']) for x in found))"
    )
    assert inside(tag, code) == "True"
    assert carried(tag, tmp_path / "out")[-1] == "certificate"


@pytest.mark.parametrize("package", ["rouge-score", "einops"], ids=["source", "wheel"])
def test_a_package_of_pip(tmp_path: Path, made: list[str], package: str) -> None:
    """rouge-score is published as source alone; einops, put in its place, as a wheel."""
    lines = [line.replace("rouge-score", package) for line in three_liner("rouge-score")]
    lines[0] = f"FROM {connected(tmp_path, made)}"
    tag = build(lines, f"mine-{package}:1", tmp_path / package, made)
    module = package.replace("-", "_")
    assert inside(tag, f"import {module}; print({module}.__name__)") == module
    assert carried(tag, tmp_path / "out")[-1] == package


def test_an_afternoon_in_a_shell(tmp_path: Path, made: list[str]) -> None:
    run, commit, bundle = three_liner("docker commit")
    assert "FROM=mine:1" in bundle
    words = run.replace(" -it ", " -i ").split()[1:]
    try:
        docker(*words, input="pip --version && echo mine >/opt/mine\n")
        docker(*commit.split()[1:])
    finally:
        docker("rm", "--force", "mine")
    made.append("mine:1")
    assert inside("mine:1", "print(open('/opt/mine').read())") == "mine"
    assert len(carried("mine:1", tmp_path / "out")) > 5


@pytest.mark.skipif("MILKTEA_LONG" not in os.environ, reason="a gigabyte more: MILKTEA_LONG=1")
def test_another_trainer(tmp_path: Path, made: list[str]) -> None:
    lines = three_liner("llamafactory")
    lines[0] = f"FROM {connected(tmp_path, made)}"
    tag = build(lines, "mine-llamafactory:1", tmp_path / "llamafactory", made)
    assert inside(tag, "import llamafactory; print('there')") == "there"
    with pytest.raises(MilkteaError, match="does not prove itself"):
        workflow.prove("practice", image=tag)
