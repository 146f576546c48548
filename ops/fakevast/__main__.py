"""`python -m ops.fakevast`: the emulator as a server of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from ops.fakevast.cloud.catalogue import load_market
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.settings import Settings
from ops.fakevast.embedded import lock_folder, running
from ops.fakevast.server import Emulator, listening_socket, write_atomically
from ops.fakevast.state import account_key, restore, save
from ops.fakevast.weather import load as load_weather


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.fakevast",
        description="vast.ai on loopback: market, API, SSH boxes, bill",
    )
    add = parser.add_argument
    number: dict[str, Any] = {"type": float, "metavar": "N"}
    several: dict[str, Any] = {"action": "append", "default": []}
    files: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    folder, switch = Path(".milktea/fakevast"), argparse.BooleanOptionalAction
    add("--port", type=int, default=0, help="0: any free one (default)")
    add("--state", type=Path, default=folder, metavar="DIR", help="of server.json and the boxes")
    idle = "end after N seconds without request and instance (0: never)"
    add("--idle-exit-s", default=0.0, help=idle, **number)
    add("--boot-s", default=2.0, help="seconds from create to running (default 2)", **number)
    add("--credit-usd", default=25.0, help="play money at the start (default 25)", **number)
    sizes = "what pulling such an image moves, and costs"
    add("--image-bytes", metavar="GLOB=N", help=sizes, **several)
    add("--catalogue", help="JSON list of machines in place of the built-in market", **files)
    add("--faults", help="JSON list of faults, see ops/fakevast/cloud/faults.py", **files)
    add("--weather", help="JSON list of bad days to come, see ops/fakevast/weather.py", **files)
    shared = "a path of this machine that boxes may reach over SFTP too"
    add("--share", metavar="PATH", help=shared, **several)
    v0_list = "GET /api/v0/instances/ lists instead of answering 410"
    add("--v0-list", action="store_true", help=v0_list)
    limits = "vast.ai's minimum intervals between calls"
    add("--rate-limits", action=switch, default=True, help=limits)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.umask(0o077)  # the key in these files lets its reader run programs as this user
    state = options.state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    lock = lock_folder(state)  # held for as long as the process lives
    if lock is None:
        server = running(state)
        print(server.url if server else f"another emulator is starting in {state}")
        sys.exit(0)
    (state / "server.json").unlink(missing_ok=True)
    cloud = new_cloud(options, state)  # what can fail does so before anybody is told of us
    sock = listening_socket(options.port)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    address = {"url": url, "pid": os.getpid(), "api_key": cloud.account.key}
    write_atomically(state / "server.json", address)
    print(url, flush=True)
    try:
        asyncio.run(serve(options, state, sock, cloud))
    finally:
        (state / "server.json").unlink(missing_ok=True)


def new_cloud(options: argparse.Namespace, state: Path) -> Cloud:
    """The market and the faults of the command line, the account of the state folder."""
    sizes = (item.rpartition("=") for item in options.image_bytes)
    settings = Settings(
        boot_s=options.boot_s,
        credit_usd=options.credit_usd,
        image_bytes={glob: int(float(size)) for glob, _, size in sizes},
        v0_list=options.v0_list,
    )
    market = load_market(options.catalogue) if options.catalogue else None
    cloud = Cloud(settings=settings, market=market, api_key=account_key(state))
    for fault in json.loads(options.faults.read_text()) if options.faults else []:
        cloud.faults.add(fault)
    restore(cloud, state)
    return cloud


async def serve(
    options: argparse.Namespace, state: Path, sock: socket.socket, cloud: Cloud
) -> None:
    """Until SIGTERM, SIGINT, or idleness."""
    shared = tuple(options.share)
    emulator = Emulator(state, cloud, rate_limits=options.rate_limits, shared_paths=shared)
    emulator.boxes.sweep()
    emulator.weather.add(load_weather(options.weather) if options.weather else [])

    def save_soon(instance: Instance) -> None:
        """After the books are closed on it, not during."""
        asyncio.get_running_loop().call_soon(save, cloud, state)

    cloud.on_destroy.append(save_soon)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await emulator.start(sock)
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            if options.idle_exit_s and emulator.idle_s() > options.idle_exit_s:
                break
    save(cloud, state)
    await emulator.close()


if __name__ == "__main__":
    main()
