"""Several people and one folder of runs: whose a run is, and who may change it.

Whoever may read the folder may look at every run (`ops/run/folders.py` has what a shared one is).
Who would change a run of another person is asked first, or refused.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from ops.errors import NotYours
from ops.job.label import RUN_ID, USER, login_name, this_user
from ops.run.journal import FILE

_FIRST_LINE_BYTES = 16 << 20  # it lists every file that is sent


def user_of(folder: Path) -> str:
    """Who rented the run in this folder, by its journal; of a run that does not say, the login name
    of who owns the folder; "" where there is none."""
    if user := _user_in_journal(folder):
        return user
    with suppress(OSError):
        return login_name(folder.stat().st_uid)
    return ""


def is_mine(folder: Path) -> bool:
    """Whether who types here rented the run. Raises ConfigError for a bad MILKTEA_USER."""
    if user := _user_in_journal(folder):
        return user == this_user()
    with suppress(OSError):
        return folder.stat().st_uid == os.getuid()
    return False


def _user_in_journal(folder: Path) -> str:
    """ "" where the first line does not say, or cannot be read."""
    try:
        with open(folder / FILE, "rb") as file:
            user = json.loads(file.readline(_FIRST_LINE_BYTES))["user"]
        return user if USER.fullmatch(user) else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def validate_mine(folder: Path, *, hint: str) -> None:
    """Raises NotYours for a run of another person."""
    if not is_mine(folder):
        whose = user_of(folder) or "another person"
        raise NotYours(f"{folder.name} is a run of {whose}, and you are {this_user()}", hint=hint)


def closed(root: Path) -> list[tuple[str, str]]:
    """(run id, user) of each run in `root` that may not be read here."""
    with suppress(OSError):
        return [
            (folder.name, user_of(folder))
            for folder in sorted(root.iterdir())
            if RUN_ID.fullmatch(folder.name) and not os.access(folder, os.R_OK | os.X_OK)
        ]
    return []
