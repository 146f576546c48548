"""What a test asks of the machine that it runs on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import socket
from contextlib import suppress

import pytest

NOT_HERE = "not on this machine"
# below the ports that the kernel gives to who asks for any; each process of tests begins elsewhere
_PORTS = range(20_000, 32_000)
_next = itertools.count(random.Random(os.getpid()).randrange(len(_PORTS)))


def needs(*tools: str) -> None:
    """Skip the test, or what asks for the fixture, where one of these programs is missing."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: {NOT_HERE}")


def free_port() -> int:
    """A port at which nobody listens. No other test of this process gets it, and no program that
    leaves the choice to the kernel."""
    for _ in _PORTS:
        port = _PORTS[next(_next) % len(_PORTS)]
        with suppress(OSError), socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
            return port
    raise AssertionError("every port is taken")
