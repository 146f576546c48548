"""Serve results on their base model: OpenAI's interface and a page to talk in.

    python -m trainer.serve.server --base MODEL NAME=RESULT [NAME=RESULT ...]

RESULT is an adapter.zip or a folder of one; without NAME= it is called as its folder. Prints one
URL with the token, which is new at each start unless --token-file holds one. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import ssl
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.result.command import quiet

if TYPE_CHECKING:  # the image may lack it, and the command line is checked before torch is imported
    from aiohttp import web

HOST, PORT = "127.0.0.1", 8014
LEAST_TOKEN = 16  # characters
SWITCH_S = 0.0005


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Refuses another address than loopback without a token of the user's own."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.serve.server",
        description="Serve results: OpenAI's interface, and a page to talk in.",
    )
    parser.add_argument("results", nargs="*", metavar="NAME=RESULT", help="adapter.zip or a folder")
    parser.add_argument("--base", required=True, help="folder of the base model, or its hub id")
    parser.add_argument("--host", default=HOST, help="address to listen at; loopback without it")
    parser.add_argument("--port", type=int, help=f"{PORT}, or a free one, without it; 0: any free")
    parser.add_argument("--token-file", type=Path, help="a file whose first line is the token")
    parser.add_argument(
        "--name", action="append", default=[], help="a host name by which browsers reach it"
    )
    parser.add_argument("--certificate", type=Path, help="PEM file with certificate and key: https")
    parser.add_argument(
        "--feedback", type=Path, default=Path(), help="folder of the rows that people's votes make"
    )
    parser.add_argument("--meter", type=Path, help="a file that says what this machine costs")
    parser.add_argument("--address", type=Path, help="a file for the line that says where, as JSON")
    parser.add_argument("--width", type=int, default=16, help="answers decoded side by side")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp8, int8 or nf4")
    parser.add_argument("--json", action="store_true", help="the line that says where, as JSON")
    found = parser.parse_args(arguments)
    if found.host not in ("127.0.0.1", "localhost", "::1") and not found.token_file:
        parser.error("--host beyond this computer needs a token of yours: --token-file FILE")
    if found.width < 1 or found.context < 16:
        parser.error("--width is at least 1, --context at least 16")
    return found


def token_of(file: Path | None) -> str:
    """The token in `file`, or a new one. Raises ValueError for one that can be guessed."""
    from trainer.serve.guard import new_token

    if file is None:
        return new_token()
    lines = file.read_text(encoding="utf-8").split()
    if not lines or len(lines[0]) < LEAST_TOKEN or not lines[0].isascii():
        raise ValueError(f"{file} has no token of {LEAST_TOKEN} ASCII characters or more")
    return lines[0]


def named(results: list[str]) -> dict[str, Path]:
    """NAME=RESULT by name. Raises ValueError for a name given twice."""
    found: dict[str, Path] = {}
    for given in results:
        name, equals, path = given.partition("=")
        file = Path(path if equals else given)
        if not equals:
            folder = file.resolve() if file.is_dir() else file.resolve().parent
            name = folder.parent.name if folder.name in ("result", "adapter") else folder.name
        if name in found:
            raise ValueError(f"two results are called {name}: NAME=RESULT")
        found[name] = file
    return found


def main() -> int:
    began = time.monotonic()
    arguments = parse()
    try:
        token, results = token_of(arguments.token_file), named(arguments.results)
        certificate = None
        if arguments.certificate:
            certificate = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            certificate.load_cert_chain(arguments.certificate)
        return _serve(arguments, token, results, certificate, began)
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        print("cannot serve: Python here has no aiohttp: install it beside torch", file=sys.stderr)
        return 3
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # what ours raise are ValueErrors
        print(f"cannot serve: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:  # while it loads: later Ctrl-C ends it in order
        print("\ninterrupted", file=sys.stderr)
        return 130


def _serve(
    arguments: argparse.Namespace,
    token: str,
    results: dict[str, Path],
    certificate: ssl.SSLContext | None,
    began: float,
) -> int:
    from trainer.result.open import DEVICES, PRECISIONS, base_folder, device_of
    from trainer.serve.app import application
    from trainer.serve.engine import Engine
    from trainer.serve.models import open_models

    quiet()
    if arguments.device not in DEVICES or arguments.precision not in PRECISIONS:
        known = f"{', '.join(DEVICES)}; --precision: {', '.join(PRECISIONS)}"
        raise ValueError(f"--device is one of: {known}")
    base, device = base_folder(arguments.base), device_of(arguments.device)
    print(f"loading {base.name} ...", file=sys.stderr, flush=True)
    models = open_models(results, base, device, arguments.context, arguments.precision)
    # whoever waits for the interpreter gets it within this time: the model's thread gives it up in
    # every call of torch, and waits for it behind whoever writes to the clients
    sys.setswitchinterval(SWITCH_S)
    engine = Engine(models, arguments.width)
    names = (arguments.host, *arguments.name)
    app = application(engine, token, arguments.feedback, names, arguments.meter)
    try:
        asyncio.run(_listen(app, arguments, token, list(models.voices), certificate, began))
    finally:
        engine.close()
    return 0


def is_of_this_server(record: logging.LogRecord) -> bool:
    """Whether a line of aiohttp's log is of this server: what strangers send that is no HTTP is
    answered by 400 and not told here."""
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError

    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


async def _listen(
    app: web.Application,
    arguments: argparse.Namespace,
    token: str,
    voices: list[str],
    certificate: ssl.SSLContext | None,
    began: float,
) -> None:
    from aiohttp import web

    logging.getLogger("aiohttp.server").addFilter(is_of_this_server)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
    await runner.setup()
    ends = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ends.set)
    try:
        port = await _bind(runner, arguments, certificate)
        scheme = "https" if certificate else "http"
        shown = arguments.name[0] if arguments.name else arguments.host
        shown = f"[{shown}]" if ":" in shown else shown
        _say(f"{scheme}://{shown}:{port}", token, voices, time.monotonic() - began, arguments)
        await ends.wait()
    finally:
        await runner.cleanup()


async def _bind(
    runner: web.AppRunner, arguments: argparse.Namespace, certificate: ssl.SSLContext | None
) -> int:
    """Listens at the wished port; at any free one where none was wished and ours is taken."""
    from aiohttp import web

    wished = PORT if arguments.port is None else arguments.port
    tries = [wished, 0] if arguments.port is None else [wished]
    for n, port in enumerate(tries):
        site = web.TCPSite(runner, arguments.host, port, ssl_context=certificate)
        try:
            await site.start()
        except OSError:
            if n + 1 == len(tries):
                raise
    return int(runner.addresses[0][1])


def _say(
    url: str, token: str, voices: list[str], took_s: float, arguments: argparse.Namespace
) -> None:
    page = f"{url}/#{token}"
    told = {"page": page, "api": f"{url}/v1", "token": token, "models": voices}
    line = json.dumps(told | {"took_s": round(took_s, 1)})
    if arguments.address is not None:
        part = arguments.address.with_name(f"{arguments.address.name}.part")
        part.write_text(line + "\n", encoding="utf-8")
        part.replace(arguments.address)  # it is there whole, or not at all
    if arguments.json:
        print(line, flush=True)
        return
    print(f"page    {page}")
    print(f"api     {url}/v1   (key: what stands behind # above)")
    print(f"models  {', '.join(voices)}   (ready after {took_s:.1f} s; Ctrl-C ends it)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
