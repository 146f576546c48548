"""The secrets that a job names: where each is sent, and what the plan says about it.

A job file has only the names of environment variables. Their values are read here when they are
sent: tokens to the box through the stdin of the launch command, over SSH; a registry's login to
vast.ai with the create. No value is written to a file, a journal line, a process's arguments or the
instance's environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ops.catalogue.models import lookup
from ops.errors import PreflightError

HUB_TOKEN, HUB_ADDRESS, BOARD_KEY = "HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY"
MAX_BYTES = 8192  # of one value
REGISTRY = "docker.io"  # of an image whose name has no registry


def value(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The variable's value, or "". HF_TOKEN may also come from `hf auth login`."""
    found = environ.get(name, "").strip()
    if not found and name == HUB_TOKEN:
        from huggingface_hub import get_token

        found = (get_token() or "").strip()
    return found


def validate(names: Sequence[str], login: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises PreflightError for variables that are not set, or whose value cannot be sent."""
    defects = []
    for name in [*names, *([login] if login else [])]:
        secret = value(name, environ)
        if not secret:
            defects.append(f"{name} is named in the job and not set here")
        elif len(secret.encode()) > MAX_BYTES or not secret.isprintable():
            defects.append(f"{name} is longer than {MAX_BYTES} bytes, or not one line of text")
        elif name == login and not _is_login(secret):
            defects.append(f"{name} must hold USER:TOKEN without spaces, for image.login")
    if defects:
        raise PreflightError(
            "\n".join(defects),
            hint="export it in this terminal and run this again, or take it out of the job file",
        )


def _is_login(secret: str) -> bool:
    user, colon, token = secret.partition(":")
    return bool(user and colon and token) and not any(c.isspace() for c in secret)


def at_launch(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> bytes:
    """The stdin of the launch command: a line NAME=VALUE for each."""
    return "".join(f"{name}={value(name, environ)}\n" for name in names).encode()


def registry_login(image: str, login: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """vast.ai's image_login for `create`; None where `login`, the variable's name, is ""."""
    if not login:
        return None
    user, _, token = value(login, environ).partition(":")
    host, slash, _ = image.partition("/")
    named = slash and ("." in host or ":" in host or host == "localhost")
    return f"-u {user} -p {token} {host if named else REGISTRY}"


def validate_gated(base: str, names: Sequence[str]) -> None:
    """Raises PreflightError for a gated model of the hub without HF_TOKEN among `names`."""
    entry = None if Path(base).is_dir() else lookup(base)
    if entry is not None and entry.gated and HUB_TOKEN not in names:
        raise PreflightError(
            f"{base} is gated: the hub gives it to accounts that accepted its licence, and the "
            "machine would be refused after it is paid for",
            hint=f'write env = ["{HUB_TOKEN}"] at the top of the job file and export a read-only '
            f"token that may read this model (https://huggingface.co/{base.partition('@')[0]})",
        )


def describe(
    names: Sequence[str],
    login: str,
    base: str,
    report_to: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """What the plan says about the variables that are sent, and about some that are set here and
    are not."""
    lines = []
    if names:
        go, them = ("goes", "it") if len(names) == 1 else ("go", "them")
        lines.append(
            f"{', '.join(names)} {go} to the machine at launch, over SSH: whoever owns the machine "
            f"can read {them}. Use a read-only, fine-grained token, and revoke it afterwards"
        )
    if login:
        lines.append(
            f"{login} goes to vast.ai and to the machine with the order, to pull the image: use a "
            "token that may only read it"
        )
    hub = not Path(base).is_dir()
    for name in (HUB_ADDRESS, HUB_TOKEN):
        if hub and environ.get(name) and name not in names:
            lines.append(f"{name} is set here and not in env: the machine does not get it")
    if "wandb" in report_to and BOARD_KEY not in names:
        lines.append(
            "Weights & Biases is written offline on the machine, and does not come home: "
            f"{BOARD_KEY} is not in env"
        )
    return lines
