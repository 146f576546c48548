"""What this user types for milktea, which the shell of a checkout does not find by its name."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path


def word() -> str:
    """`milktea`, or its path where the shell does not find the name."""
    here = Path(sys.executable).with_name("milktea")
    return short(here) if here.is_file() and not shutil.which("milktea") else "milktea"


def as_typed(text: str) -> str:
    """`text` whose commands, between backquotes or all of it, begin with what this user types."""
    return re.sub(r"(\A|`)milktea (?=[a-z])", lambda found: f"{found[1]}{word()} ", text)


def short(path: Path) -> str:
    """A path as it is called from the working directory, where it lies in that."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
