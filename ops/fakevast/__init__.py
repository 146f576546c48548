"""A vast.ai that runs on loopback: the HTTP API, the market, the bill, and machines to ssh into.

    python -m ops.fakevast                     a server for anybody; prints its URL
    with FakeVast(tmp_path) as cloud: ...      the same inside a test, its faults and clock in hand
    Cloud(VirtualClock())                      only the state machine: no socket, process or thread

It imitates what vast.ai's own client and other people's clients were seen to rely on, refusals and
oddities included. Routes that it does not imitate answer 501 and name themselves. Nothing here is
contacted over the internet and nothing is paid.
"""

from __future__ import annotations

from ops.fakevast.cloud.clock import ScaledClock, VirtualClock
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.server import FakeVast

__all__ = ["Cloud", "FakeVast", "ScaledClock", "VirtualClock"]
