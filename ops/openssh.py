"""Bulk bytes through OpenSSH's own client, where this machine has it: its encryption costs half of paramiko's CPU time.

`pour` sends a file, `draw` receives what a script prints. Both use the box's pinned key and the endpoint that is in use.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from ops.box import Box
from ops.channel import MARK, Stream
from ops.errors import BoxError, Lost

LOOK_S = 0.1  # between two looks at how far a file has gone
PIPE_BYTES = 1 << 20
READ_BYTES = 1 << 18
LINK_BROKE = 255  # ssh's own exit code, never the script's
_STILL_RENTED = "the box is still rented"


def pour(box: Box, script: str, source: IO[bytes], moved: Callable[[int], None]) -> None:
    """Run `script` with the rest of `source`, an unbuffered file, as its stdin; no byte passes through Python.

    `moved` hears the position in the file now and then: ssh shares it with us. Raises Lost, BoxError."""
    with _ssh(box, script, stdin=source, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            try:
                child.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                moved(source.tell())


def draw(box: Box, script: str, sink: Callable[[bytes], None]) -> None:
    """Run `script`; what it prints goes to `sink` piece by piece. Raises Lost, BoxError."""
    with _ssh(box, f"{MARK}\n{script}", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(child.stdout.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        out = Stream(0, sink)
        while data := os.read(child.stdout.fileno(), READ_BYTES):
            out.take(data)


@contextmanager
def _ssh(box: Box, script: str, stdin: IO[bytes] | int, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    """The client, running; at the end its exit code is judged."""
    options = box.ssh_options()  # reconnects: the endpoint is one that answers, and its key is pinned
    assert box.endpoint is not None
    command = ["ssh", *options, "-l", box.user, box.endpoint.host, f"exec sh -c {shlex.quote('cd || exit; ' + script)}"]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=errors, env=os.environ | {"LC_ALL": "C"})
        try:
            yield child
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()[-500:]
    if code == LINK_BROKE or code < 0:
        box.close()  # the same link carried both; the next call finds out who answers now
        raise Lost(f"ssh ended with {code}: {said}", money=_STILL_RENTED)
    if code:
        raise BoxError(f"the box ended a transfer with {code}: {said}", money=_STILL_RENTED)
