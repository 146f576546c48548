"""Where runs and the emulator lie on this computer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
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
