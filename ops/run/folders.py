"""Where runs and the emulator lie on this computer, and who may read them there.

A folder of runs is shared where its group may write, what is made in it takes its group, and nobody
else may enter: `chmod 2770`. Its runs are then open to the group, save for their SSH keys.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def project_folder() -> Path:
    """The nearest folder with `runs` or `.milktea` in it, from the
    working directory upwards and below the home or the root; else the working directory."""
    here = Path.cwd()
    ends = {Path.home(), Path(here.anchor), Path(tempfile.gettempdir()).resolve()}
    for folder in (here, *here.parents):
        if folder in ends:
            break
        if (folder / "runs").is_dir() or (folder / ".milktea").is_dir():
            return folder
    return here


def runs_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of runs: MILKTEA_RUNS, or `runs` in the project's folder."""
    return Path(environ.get("MILKTEA_RUNS") or project_folder() / "runs").resolve()


def is_shared(folder: Path) -> bool:
    """Whether a group shares this folder, of runs or of one run."""
    with suppress(OSError):
        mode = folder.stat().st_mode
        return bool(mode & stat.S_ISGID) and mode & 0o077 == 0o070
    return False


def guard(run_folder: Path) -> None:
    """Close a run's folder to other users, who are not to read prompts and answers: to all of them,
    or to those outside the group that shares the folder of runs."""
    with suppress(OSError):  # of another person, or a disk without rights
        run_folder.chmod(0o2770 if is_shared(run_folder.parent) else 0o700)


def ours(path: str, flags: int) -> int:
    """An opener for `open`: a file that it makes is for its owner, and in a shared folder for the
    group, which may write to it."""
    if not is_shared(Path(path).parent):
        return os.open(path, flags, 0o600)
    fd = os.open(path, flags, 0o660)
    with suppress(OSError):  # a colleague's file stays as it was made
        os.fchmod(fd, 0o660)  # whatever the umask
    return fd
