"""An emulator, a key pair and vast.ai's own client for the tests of fakevast."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakevast.renter import Key, Reach, client_of, processes_of, reach, rent
from machine import needs
from vastai.api import keys as vast_keys
from vastai.api.client import VastClient

from ops.fakevast import FakeVast


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    """Made and used by OpenSSH's own programs, as most renters have them."""
    needs("ssh", "ssh-keygen")
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return Key(path, path.with_suffix(".pub").read_text().strip())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., FakeVast]]:
    """Starts emulators with settings of the test's own; all are gone afterwards, with every process
    of their boxes."""
    started: list[FakeVast] = []

    def start(**settings: Any) -> FakeVast:
        fake = FakeVast(tmp_path / f"fakevast-{len(started)}", **settings)
        started.append(fake)
        return fake.__enter__()

    yield start
    for fake in started:
        fake.__exit__()
    assert processes_of(tmp_path) == [], "a box's process outlived its emulator"


@pytest.fixture
def fake(make: Callable[..., FakeVast]) -> FakeVast:
    return make()


@pytest.fixture
def client(fake: FakeVast) -> VastClient:
    return client_of(fake)


@pytest.fixture
def box(fake: FakeVast, client: VastClient, key: Key) -> tuple[int, Reach]:
    """A running box of the milktea image, and how to log in."""
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client, label="run-1")
    return number, reach(client, number, key)
