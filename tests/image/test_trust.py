"""Who made a bundle: what INSTALL.sh believes, and every forgery that it refuses."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_shell import flip, jail, pinned

from ops.image.bundle import signature
from ops.image.bundle.contents import Options


@pytest.fixture
def signed(tiny: Any, tmp_path: Path, release_key: Path) -> Path:
    tiny.pack(tmp_path / "bundle", Options(release=7, key=release_key))
    return tmp_path / "bundle"


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    signature.make_key(tmp_path / "stranger")
    return tmp_path / "stranger"


def sign_again(bundle: Path, key: Path) -> None:
    """The sums made anew over what lies there, and signed."""
    files = sorted(
        p for p in bundle.rglob("*") if p.is_file() and not p.name.startswith("SHA256SUMS")
    )
    rows = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(bundle)}\n" for p in files
    ]
    (bundle / "SHA256SUMS").write_text("".join(rows))
    signature.sign(bundle / "SHA256SUMS", key)


@pytest.mark.parametrize("form", ["fingerprint", "pub", "pem"])
def test_the_right_key_is_good_in_each_of_its_forms(
    signed: Path, install: Callable, release_key: Path, form: str
) -> None:
    key = (
        signature.fingerprint(Path(f"{release_key}.pub"))
        if form == "fingerprint"
        else f"{release_key}.{form}"
    )
    ran = install(signed, "verify", "--key", key)
    assert ran.code == 0 and "signature good" in ran.out and "given by --key" in ran.out


@pytest.mark.parametrize("form", ["fingerprint", "pub", "pem"])
def test_a_strangers_bundle_is_refused_with_the_senders_key(
    tiny: Any, install: Callable, tmp_path: Path, release_key: Path, stranger: Path, form: str
) -> None:
    tiny.pack(tmp_path / "theirs", Options(key=stranger))
    key = (
        signature.fingerprint(Path(f"{release_key}.pub"))
        if form == "fingerprint"
        else f"{release_key}.{form}"
    )
    ran = install(tmp_path / "theirs", "verify", "--key", key)
    assert ran.code == 5 and "wrong signature" in ran.err


def test_a_key_from_the_carried_disk_vouches_for_nothing(
    signed: Path, install: Callable, tmp_path: Path, release_key: Path
) -> None:
    (signed / "keys").mkdir()
    shutil.copy(f"{release_key}.pub", signed / "keys" / "release.pub")
    ran = install(signed, "verify", "--key", str(signed / "keys/release.pub"))
    assert ran.code == 5 and "lies on the disk that it is to vouch for" in ran.err
    shutil.copy(signed / "keys/release.pub", tmp_path / "copied.pub")
    ran = install(signed, "verify", "--key", str(tmp_path / "copied.pub"))
    assert ran.code == 5 and "is the file keys/release.pub of the disk" in ran.err
    (tmp_path / "link.pub").symlink_to(signed / "keys" / "release.pub")
    assert install(signed, "verify", "--key", str(tmp_path / "link.pub")).code == 5


def test_a_known_sender_binds_the_next_bundles(
    tiny: Any, signed: Path, install: Callable, tmp_path: Path, release_key: Path, stranger: Path
) -> None:
    pinned(tmp_path / "prefix", release_key)
    assert (
        "signature good, by ssh-keygen, with the key that this server knows"
        in install(signed, "verify").out
    )
    tiny.pack(tmp_path / "unsigned")
    ran = install(tmp_path / "unsigned", "verify")
    assert ran.code == 5 and "not signed" in ran.err
    tiny.pack(tmp_path / "theirs", Options(key=stranger))
    assert install(tmp_path / "theirs", "verify").code == 5
    for command in ("preflight", "rollback", "install", "verify"):
        assert install(tmp_path / "theirs", command).code == 5, command


def test_another_sender_needs_new_sender_and_a_key(
    tiny: Any, install: Callable, tmp_path: Path, release_key: Path, stranger: Path
) -> None:
    pinned(tmp_path / "prefix", release_key, pem=True)
    tiny.pack(tmp_path / "theirs", Options(key=stranger))
    for form in (
        signature.fingerprint(Path(f"{stranger}.pub")),
        f"{stranger}.pub",
        f"{stranger}.pem",
    ):
        ran = install(tmp_path / "theirs", "verify", "--key", form)
        assert ran.code == 5 and (
            "knows another sender" in ran.err or "wrong signature" in ran.err
        ), form
        assert install(tmp_path / "theirs", "verify", "--key", form, "--new-sender").code == 0, form
    assert install(tmp_path / "theirs", "verify", "--new-sender").code == 2


@pytest.mark.parametrize("tool", ["ssh-keygen", "openssl", ""])
@pytest.mark.parametrize("left", ["sig", "openssl", "both", "none"])
def test_a_known_sender_is_never_got_round_by_a_signature_of_the_other_kind(
    tiny: Any,
    install: Callable,
    tmp_path: Path,
    release_key: Path,
    stranger: Path,
    tool: str,
    left: str,
) -> None:
    pinned(tmp_path / "prefix", release_key, pem=True)
    tiny.pack(tmp_path / "theirs", Options(key=stranger))
    for kind in ("sig", "openssl"):
        if left not in (kind, "both"):
            (tmp_path / "theirs" / f"SHA256SUMS.{kind}").unlink()
    path = jail(tmp_path / "jail", *([tool] if tool else []))
    ran = install(tmp_path / "theirs", "verify", path=path)
    assert ran.code == 5, ran.out + ran.err
    assert "REFUSED" in ran.err and "do this:" in ran.err


@pytest.mark.parametrize("tool", ["ssh-keygen", "openssl"])
def test_one_tool_is_enough_for_the_right_sender(
    signed: Path, install: Callable, tmp_path: Path, release_key: Path, tool: str
) -> None:
    pinned(tmp_path / "prefix", release_key, pem=True)
    ran = install(signed, "verify", path=jail(tmp_path / "jail", tool))
    assert (
        ran.code == 0
        and f"signature good, by {tool}, with the key that this server knows" in ran.out
    )


def test_without_a_known_sender_an_unsigned_bundle_is_told_and_may_be_refused(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    tiny.pack(tmp_path / "b")
    ran = install(tmp_path / "b", "verify")
    assert ran.code == 0 and "note  signature not signed" in ran.out and "SHA256SUMS is " in ran.out
    ran = install(tmp_path / "b", "verify", "--require-signature")
    assert ran.code == 5 and "not signed" in ran.err


@pytest.mark.parametrize("file", ["SHA256SUMS", "SHA256SUMS.sig", "SHA256SUMS.openssl"])
def test_a_flipped_bit_in_the_signed_list_or_its_signature_is_refused(
    signed: Path, install: Callable, tmp_path: Path, release_key: Path, file: str
) -> None:
    pinned(tmp_path / "prefix", release_key, pem=True)
    flip(signed / file, (signed / file).stat().st_size // 2)
    assert install(signed, "verify").code in (4, 5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"x",
        lambda data: data + b"\0",
        lambda data: data[:-1],
        lambda data: data.replace(b"\n", b"\v", 2).replace(b"\v", b"\n", 1),
        lambda data: data.replace(b"AAAAAQ", b"AAAAAA", 1),  # of version 0
    ],
)
def test_what_ssh_keygen_overlooks_in_a_signature_is_a_damage_too(
    signed: Path,
    install: Callable,
    tmp_path: Path,
    release_key: Path,
    spoil: Callable[[bytes], bytes],
) -> None:
    pinned(tmp_path / "prefix", release_key)
    file = signed / "SHA256SUMS.sig"
    file.write_bytes(spoil(file.read_bytes()))
    ran = install(signed, "verify")
    assert ran.code == 5 and "SHA256SUMS.sig is damaged" in ran.err
    assert "do this: copy SHA256SUMS.sig" in ran.err


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_what_openssl_overlooks_behind_a_signature_is_a_damage_too(
    tiny: Any, install: Callable, tmp_path: Path, kind: str
) -> None:
    """openssl reads at most the longest signature of a key, and most are that long."""
    key = tmp_path / "sender"
    form = ["-t", kind, "-m", "PEM", *(["-b", "2048"] if kind == "rsa" else [])]
    subprocess.run(["ssh-keygen", "-q", *form, "-N", "", "-f", key], check=True)
    signature.write_public(key)
    tiny.pack(tmp_path / "b", Options(key=key))
    file = tmp_path / "b/SHA256SUMS.openssl"
    longest = 72 if kind == "ecdsa" else file.stat().st_size
    while file.stat().st_size < longest:  # an ECDSA signature has other bytes each time
        signature.sign(tmp_path / "b/SHA256SUMS", key)
    path = jail(tmp_path / "jail", "openssl")
    words = ("verify", "--key", f"{key}.pem")
    assert "signature good, by openssl" in install(tmp_path / "b", *words, path=path).out
    for more in (b"x", b"more" * 3000):
        whole = file.read_bytes()
        file.write_bytes(whole + more)
        ran = install(tmp_path / "b", *words, path=path)
        assert ran.code == 5 and "SHA256SUMS.openssl is damaged" in ran.err
        file.write_bytes(whole)


def test_a_signature_as_large_as_a_layer_is_refused_at_once(
    signed: Path, install: Callable, tmp_path: Path, release_key: Path
) -> None:
    """ssh-keygen takes minutes over what lies there when the files of a disk were exchanged."""
    pinned(tmp_path / "prefix", release_key)
    (signed / "SHA256SUMS.sig").write_bytes(bytes(10) + b"layer" * 4_000_000)
    began = time.monotonic()
    ran = install(signed, "verify")
    assert ran.code == 5 and "wrong signature" in ran.err and time.monotonic() - began < 30


@pytest.mark.parametrize(
    "file", ["tools/milktea-run", "tools/installer.py", "PLAN", "image.lock", "INSTALL.sh"]
)
def test_a_small_file_that_was_exchanged_is_refused_by_its_name(
    signed: Path, install: Callable, file: str
) -> None:
    with (signed / file).open("a") as out:
        out.write("\n# OWNED\n")
    ran = install(signed, "verify")
    assert ran.code == 4 and f"{file} is damaged, or belongs to another bundle" in ran.err


def test_a_small_file_exchanged_after_its_check_is_not_what_is_used(
    signed: Path, install: Callable, tmp_path: Path
) -> None:
    """A docker command that exchanges milktea-run on the disk the moment that it is asked for
    anything.
    """
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(f"#!/bin/sh\necho OWNED >{signed}/tools/milktea-run\nexit 1\n")
    docker.chmod(0o755)
    import os

    ran = install(signed, "install", path=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert ran.code == 3 and not (tmp_path / "prefix" / "bin").exists()
    assert "OWNED" in (signed / "tools/milktea-run").read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ref mtb/tiny:", "ref other/image:"),
        ("name tiny", "name ../../etc"),
        ("name tiny", "name -rf"),
        ("id ", "id ../"),
        ("intermediate mtb/tiny:", "intermediate debian:"),
        ("vol parts/", "vol ../parts/"),
        ("vol parts/", "vol /etc/parts/"),
        ("release 7", "release 7;reboot"),
        ("ref mtb/tiny:", "ref mtb/tiny:$(id)"),
    ],
)
def test_names_that_would_leave_their_place_are_refused_even_when_signed(
    signed: Path, install: Callable, release_key: Path, old: str, new: str
) -> None:
    plan = signed / "PLAN"
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new, 1))
    sign_again(signed, release_key)
    ran = install(signed, "verify", "--key", f"{release_key}.pub")
    assert ran.code == 4 and "PLAN is damaged" in ran.err and "ask the sender" in ran.err


def test_an_older_release_needs_allow_older(
    signed: Path, install: Callable, tmp_path: Path
) -> None:
    (tmp_path / "prefix/state").mkdir(parents=True)
    (tmp_path / "prefix/state/tiny").write_text(
        "current mtb/tiny:x\nrelease 8\ngpus all\nprevious \n"
    )
    ran = install(signed)
    assert (
        ran.code == 5 and "release 7, and 8 is installed" in ran.err and "--allow-older" in ran.err
    )
    ran = install(signed, "--allow-older", path=jail(tmp_path / "jail", "openssl"))
    assert ran.code == 3 and "no docker command" in ran.out, "it goes on to the next check"
