"""Secrets that a job names and this machine holds: what goes where, and what the plan says of it.

A job file has names alone. Values are read here when they are sent: to the box over SSH at launch,
through the launch's stdin; a registry's login to vast.ai with the create. No value stands in a
file, a journal's line, a process's arguments or the instance's environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ops.catalogue.models import lookup
from ops.errors import PreflightError

HUB_TOKEN, HUB_ADDRESS, BOARD_KEY = "HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY"
MAX_BYTES = 8192  # of one value
REGISTRY = "docker.io"  # of an image that names none


def value(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """What this machine holds under a name, or "". HF_TOKEN may also be that of `hf auth login`."""
    found = environ.get(name, "").strip()
    if not found and name == HUB_TOKEN:
        from huggingface_hub import get_token

        found = (get_token() or "").strip()
    return found


def validate(names: Sequence[str], login: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises PreflightError for names that hold nothing here, or nothing that can be sent."""
    defects = []
    for name in [*names, *([login] if login else [])]:
        held = value(name, environ)
        if not held:
            defects.append(f"{name} is named in the job and not set here")
        elif len(held.encode()) > MAX_BYTES or not held.isprintable():
            defects.append(f"{name} is longer than {MAX_BYTES} bytes, or not one line of text")
        elif name == login and not _is_login(held):
            defects.append(f"{name} must hold USER:TOKEN without spaces, for image.login")
    if defects:
        raise PreflightError(
            "\n".join(defects),
            hint="export it in this terminal and run this again, or take it out of the job file",
        )


def _is_login(held: str) -> bool:
    user, colon, token = held.partition(":")
    return bool(user and colon and token) and not any(c.isspace() for c in held)


def at_launch(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> bytes:
    """The launch's stdin: NAME=VALUE a line."""
    return "".join(f"{name}={value(name, environ)}\n" for name in names).encode()


def registry_login(image: str, login: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """vast.ai's image_login for `create`, or None without `login`."""
    if not login:
        return None
    user, _, token = value(login, environ).partition(":")
    host, slash, _ = image.partition("/")
    named = slash and ("." in host or ":" in host or host == "localhost")
    return f"-u {user} -p {token} {host if named else REGISTRY}"


def validate_gated(base: str, names: Sequence[str]) -> None:
    """Raises PreflightError for a gated model that the box would be refused."""
    entry = None if Path(base).is_dir() else lookup(base)
    if entry is not None and entry.gated and HUB_TOKEN not in names:
        raise PreflightError(
            f"{base} is gated: the hub gives it to accounts that accepted its licence, and the "
            "machine would be refused after it is paid for",
            hint=f'write env = ["{HUB_TOKEN}"] at the top of the job file and export a read-only '
            f"token that may read this model (https://huggingface.co/{base.partition('@')[0]})",
        )


def told(
    names: Sequence[str],
    login: str,
    base: str,
    report_to: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """What the plan says of them, and of those that are set here and stay."""
    lines = []
    if names:
        lines.append(
            f"{', '.join(names)} go to the machine at launch, over SSH: whoever owns the machine "
            "can read them. Use a read-only, fine-grained token, and revoke it afterwards"
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
