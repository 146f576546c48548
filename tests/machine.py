"""What a test asks of the machine that it runs on."""

from __future__ import annotations

import shutil

import pytest

NOT_HERE = "not on this machine"


def needs(*tools: str) -> None:
    """Skip the test, or what asks for the fixture, where one of these programs is missing."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: {NOT_HERE}")
