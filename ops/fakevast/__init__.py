"""A vast.ai that runs on loopback: the HTTP API, the market, the bill, and machines that one can ssh into.

    python -m ops.fakevast                     a server for anybody; prints its URL
    with FakeVast(tmp_path) as cloud: ...      the same inside a test, with its faults and its clock in hand
    Cloud(VirtualClock())                      only the state machine: no socket, no process, no thread

It imitates what vast.ai's own client and other people's clients were seen to rely on, refusals and oddities included. Routes
that it does not imitate answer 501 and name themselves. Nothing here is contacted over the internet and nothing is paid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ops.fakevast.cloud.clock import RealClock, VirtualClock
    from ops.fakevast.cloud.cloud import Cloud
    from ops.fakevast.server import FakeVast

__all__ = ["Cloud", "FakeVast", "RealClock", "VirtualClock"]

_HOME = {"Cloud": "cloud.cloud", "FakeVast": "server", "RealClock": "cloud.clock", "VirtualClock": "cloud.clock"}


def __getattr__(name: str) -> Any:
    """Names load when used: `ops.fakevast.embedded` must start without paying for aiohttp."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
