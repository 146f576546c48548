"""What holds for every test: no connection beyond loopback, no process of ours left behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import NOT_HERE

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub is imported: it tries for seconds
# before torch is imported by any test: two workers with a thread for each core wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
SLOW_S = 900
LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that reaches beyond this machine fails at the socket."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to connect to {address}")
        return real(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test that names no time of its own may take as long as this."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With MILKTEA_SKIPPED=FILE, list there the tests that skip for want of a program: CI runs them
    once more where it is."""
    file = os.environ.get("MILKTEA_SKIPPED")
    if file and report.skipped and NOT_HERE in str(report.longrepr):
        if "PYTEST_XDIST_WORKER" not in os.environ:
            with Path(file).open("a") as listed:
                listed.write(f"{report.nodeid}\n")
