"""`python -m ops.fakevast`: the emulator as a server of its own."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ops.fakevast.cloud.instance import Instance


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.fakevast", description="vast.ai on loopback: market, API, SSH boxes, bill")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")
    parser.add_argument("--state", type=Path, default=Path(".milktea/fakevast"), metavar="DIR", help="server.json, boxes and the account live here")
    parser.add_argument("--idle-exit-s", type=float, default=0.0, metavar="N", help="end after N seconds without request and instance (0: never)")
    parser.add_argument("--boot-s", type=float, default=2.0, metavar="N", help="seconds from create to running (default 2)")
    parser.add_argument("--credit-usd", type=float, default=25.0, metavar="N", help="play money at the start (default 25)")
    parser.add_argument("--image-bytes", action="append", default=[], metavar="GLOB=N", help="what pulling such an image moves, and costs")
    parser.add_argument("--catalogue", type=Path, metavar="FILE", help="JSON list of machines in place of the built-in market")
    parser.add_argument("--faults", type=Path, metavar="FILE", help="JSON list of faults, see ops/fakevast/cloud/faults.py")
    parser.add_argument("--share", action="append", default=[], metavar="PATH", help="a path of this machine that boxes may reach over SFTP too")
    parser.add_argument("--v0-list", action="store_true", help="GET /api/v0/instances/ lists instead of answering 410")
    parser.add_argument("--rate-limits", action=argparse.BooleanOptionalAction, default=True, help="vast.ai's least intervals between calls")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    state = options.state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    lock = open(state / "lock", "a")  # noqa: SIM115 (held for as long as the process lives)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        from ops.fakevast.embedded import running

        server = running(state)
        print(server.url if server else f"another emulator is starting in {state}")
        sys.exit(0)
    (state / "server.json").unlink(missing_ok=True)
    market, faults = read_files(options)  # what can fail does so before anybody is told that we are here
    from ops.fakevast.server import listening_socket, write_atomically
    from ops.fakevast.state import account_key

    sock = listening_socket(options.port)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    key = account_key(state)
    # written before the slow imports: whoever connects now waits in the socket's queue for a moment
    write_atomically(state / "server.json", {"url": url, "pid": os.getpid(), "api_key": key})
    print(url, flush=True)
    try:
        asyncio.run(serve(options, state, sock, key, market, faults))
    finally:
        (state / "server.json").unlink(missing_ok=True)


def read_files(options: argparse.Namespace) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]]]:
    """The market and the faults of the command line, checked."""
    from ops.fakevast.cloud.catalogue import load_market
    from ops.fakevast.cloud.faults import Faults

    faults = json.loads(options.faults.read_text()) if options.faults else []
    for fault in faults:
        Faults().add(fault)
    return load_market(options.catalogue) if options.catalogue else None, faults


async def serve(
    options: argparse.Namespace, state: Path, sock: Any, key: str, market: list[dict[str, Any]] | None, faults: list[dict[str, Any]]
) -> None:
    """Until SIGTERM, SIGINT, or idleness."""
    from ops.fakevast.cloud.cloud import Cloud, Settings
    from ops.fakevast.server import Emulator
    from ops.fakevast.state import restore, save

    sizes = {glob: int(float(size)) for glob, _, size in (item.rpartition("=") for item in options.image_bytes)}
    settings = Settings(boot_s=options.boot_s, credit_usd=options.credit_usd, image_bytes=sizes, v0_list=options.v0_list)
    cloud = Cloud(settings=settings, market=market, api_key=key)
    restore(cloud, state)
    for fault in faults:
        cloud.faults.add(fault)
    emulator = Emulator(state, cloud, rate_limits=options.rate_limits, shared_paths=tuple(options.share))
    emulator.boxes.sweep()

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
