from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ops.errors import PreflightError
from ops.image.bundle import signature as sign


def test_one_key_signs_for_ssh_keygen_and_for_openssl(tmp_path: Path, release_key: Path) -> None:
    file = tmp_path / "SHA256SUMS"
    file.write_text("content\n")
    assert {p.name for p in sign.sign(file, release_key)} == {"SHA256SUMS.sig", "SHA256SUMS.openssl"}
    public = sign.public_files(release_key)
    (tmp_path / "allowed").write_bytes(public["allowed_signers"])
    (tmp_path / "pem").write_bytes(public["release.pem"])
    check = ["openssl", "dgst", "-sha256", "-verify", str(tmp_path / "pem"), "-signature", f"{file}.openssl", str(file)]
    assert sign.is_good(file, tmp_path / "allowed")
    assert subprocess.run(check, capture_output=True).returncode == 0
    file.write_text("contend\n")
    assert not sign.is_good(file, tmp_path / "allowed")
    assert subprocess.run(check, capture_output=True).returncode != 0


def test_the_signature_of_another_key_is_not_good(tmp_path: Path, release_key: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    sign.make_key(tmp_path / "other")
    sign.sign(file, tmp_path / "other")
    (tmp_path / "allowed").write_bytes(sign.public_files(release_key)["allowed_signers"])
    assert not sign.is_good(file, tmp_path / "allowed")


def test_an_ed25519_key_of_openssh_signs_for_ssh_keygen_alone(tmp_path: Path) -> None:
    key = tmp_path / "ed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (tmp_path / "f").write_text("x")
    assert [p.name for p in sign.sign(tmp_path / "f", key)] == ["f.sig"]
    assert set(sign.public_files(key)) == {"allowed_signers", "release.pub"}


def test_a_missing_key_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(PreflightError, match="no signing key") as refused:
        sign.sign(tmp_path / "f", tmp_path / "nokey")
    assert refused.value.hint.startswith("milktea image keygen")


def test_a_key_is_never_overwritten(tmp_path: Path, release_key: Path) -> None:
    before = release_key.read_bytes()
    with pytest.raises(PreflightError, match="exists"):
        sign.make_key(release_key)
    assert release_key.read_bytes() == before
