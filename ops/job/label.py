"""The label of a run's boxes on vast.ai, which tells whose they are: RUN_ID.USER, or RUN_ID alone
as milktea wrote it before it knew users. What reads a label takes both."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ops.errors import ConfigError

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]*-\d{8}-\d{6}-[0-9a-f]{4}")
USER = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Label:
    run_id: str
    user: str = ""  # who rented; "" where the label does not say

    def __str__(self) -> str:
        return f"{self.run_id}.{self.user}" if self.user else self.run_id


def parse(text: str) -> Label | None:
    """None for a label that is not of a run."""
    run_id, dot, user = text.partition(".")
    if not RUN_ID.fullmatch(run_id) or (dot and not USER.fullmatch(user)):
        return None
    return Label(run_id, user)


def is_of(text: str, run_id: str) -> bool:
    """Whether a box with this label is one of this run, whoever rented it."""
    found = parse(text)
    return text == run_id or (found is not None and found.run_id == run_id)


def this_user(environ: Mapping[str, str] = os.environ) -> str:
    """Who types here: MILKTEA_USER, or the login name in a label's plain characters. Raises
    ConfigError for a MILKTEA_USER that has others."""
    if named := environ.get("MILKTEA_USER", ""):
        if USER.fullmatch(named):
            return named
        raise ConfigError(
            f"MILKTEA_USER {named!r} cannot stand in a label: a to z, 0 to 9, - and _, at most 32, "
            "the first a letter or a digit",
            hint="export MILKTEA_USER=alice",
        )
    return login_name(os.getuid())


def login_name(uid: int) -> str:
    """The login name of a user of this machine as a label has it; uid1000 where it has none, or
    none of a label's characters."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    plain = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:32]
    return plain or f"uid{uid}"
