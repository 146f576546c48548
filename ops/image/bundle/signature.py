"""Signatures that a bare server can check: ssh-keygen -Y, and openssl for servers whose OpenSSH is
too old (before 8.1).

One ECDSA P-256 key in PEM form serves both tools. Neither half travels in a bundle: whoever
installs gets the public one, or its fingerprint, by another way.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ops.errors import PreflightError

SIGNER = "milktea-release"
NAMESPACE = "milktea-bundle"


def make_key(path: Path) -> str:
    """A new key at ``path``, without a passphrase, its public half in ``path``.pub and
    ``path``.pem; returns its fingerprint.

    Never overwrites."""
    if path.exists():
        raise PreflightError(f"{path} exists", hint="sign with it, or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _run(
        [
            "ssh-keygen",
            "-t",
            "ecdsa",
            "-m",
            "PEM",
            "-N",
            "",
            "-C",
            SIGNER,
            "-f",
            str(path),
        ],
        "cannot make a key",
    )
    write_public(path)
    return fingerprint(path.with_name(path.name + ".pub"))


def fingerprint(public_key: Path) -> str:
    """``SHA256:...`` as ssh-keygen prints it: short enough to be read over the telephone."""
    return _run(
        ["ssh-keygen", "-l", "-f", str(public_key)], f"{public_key} is not a public key"
    ).split()[1]


def sign(file: Path, key: Path) -> None:
    """Write FILE.sig (ssh-keygen) and, when the key is one that openssl reads, FILE.openssl."""
    if not key.is_file():
        raise PreflightError(
            f"there is no signing key at {key}", hint="milktea image keygen " + str(key)
        )
    signature = file.with_name(file.name + ".sig")
    signature.unlink(missing_ok=True)
    _run(
        ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file)],
        f"{key} cannot sign",
    )
    if _openssl_reads(key):
        other = file.with_name(file.name + ".openssl")
        _run(
            ["openssl", "dgst", "-sha256", "-sign", str(key), "-out", str(other), str(file)],
            f"{key} cannot sign",
        )


def signature_names(file: str, key: Path) -> list[str]:
    """What `sign` will write beside `file` with this key."""
    return [f"{file}.sig", *([f"{file}.openssl"] if _openssl_reads(key) else [])]


def write_public(key: Path) -> None:
    """Write KEY.pub and, where openssl reads the key, KEY.pem: what the receiver must get by
    another way than the disk.
    """
    kind, body = _run(["ssh-keygen", "-y", "-f", str(key)], f"{key} is not a private key").split()[
        :2
    ]
    public = key.with_name(key.name + ".pub")
    public.write_text(f"{kind} {body} {SIGNER}\n")
    if not _openssl_reads(key):
        return
    pem = key.with_name(key.name + ".pem")
    pem.write_text(
        _run(["openssl", "pkey", "-in", str(key), "-pubout"], f"openssl cannot read {key}")
    )


def _openssl_reads(key: Path) -> bool:
    """RSA and ECDSA keys in PEM form; ed25519 in OpenSSH's own form is for ssh-keygen alone."""
    if not shutil.which("openssl") or b"OPENSSH PRIVATE KEY" in key.read_bytes()[:64]:
        return False
    return (
        subprocess.run(
            ["openssl", "pkey", "-in", str(key), "-noout"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
        ).returncode
        == 0
    )


def _run(command: list[str], what: str) -> str:
    if not shutil.which(command[0]):
        raise PreflightError(
            f"{what}: {command[0]} is not installed", hint="install openssh-client and openssl"
        )
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise PreflightError(
            f"{what}: {done.stderr.strip() or done.stdout.strip()}",
            hint="ssh-keygen -l -f KEY shows what it is",
        )
    return done.stdout
