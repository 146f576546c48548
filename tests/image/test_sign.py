from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from machine import needs

from ops.errors import PreflightError
from ops.image.bundle import signature as sign


def by_ssh(file: Path) -> str:
    """The fingerprint of the key that signed, by the command that the README gives; empty where the
    signature is not good.
    """
    command = ["ssh-keygen", "-Y", "check-novalidate", "-n", sign.NAMESPACE, "-s", f"{file}.sig"]
    with file.open("rb") as content:
        done = subprocess.run(command, stdin=content, capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else ""


def test_one_key_signs_for_ssh_keygen_and_for_openssl(tmp_path: Path, release_key: Path) -> None:
    file = tmp_path / "SHA256SUMS"
    file.write_text("content\n")
    sign.sign(file, release_key)
    assert {p.name for p in tmp_path.glob(f"{file.name}.*")} == {
        "SHA256SUMS.sig",
        "SHA256SUMS.openssl",
    }
    check = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        f"{release_key}.pem",
        "-signature",
        f"{file}.openssl",
        str(file),
    ]
    assert by_ssh(file) == sign.fingerprint(Path(f"{release_key}.pub"))
    assert subprocess.run(check, capture_output=True).returncode == 0
    file.write_text("contend\n")
    assert by_ssh(file) == ""
    assert subprocess.run(check, capture_output=True).returncode != 0


def test_an_ed25519_key_of_openssh_signs_for_ssh_keygen_alone(tmp_path: Path) -> None:
    needs("ssh-keygen")
    key = tmp_path / "ed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (tmp_path / "f").write_text("x")
    sign.sign(tmp_path / "f", key)
    sign.write_public(key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ed", "ed.pub", "f", "f.sig"]


def test_a_missing_key_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(PreflightError, match="no signing key") as refused:
        sign.sign(tmp_path / "f", tmp_path / "nokey")
    assert refused.value.hint.startswith("milktea image keygen")


def test_a_key_is_never_overwritten(release_key: Path) -> None:
    before = release_key.read_bytes()
    with pytest.raises(PreflightError, match="exists"):
        sign.make_key(release_key)
    assert release_key.read_bytes() == before
