"""One machine over SSH: connect, run, read, stream. The only module that imports fabric.

fabric opens the connection; the session channel is read here, because `Connection.run` sends stdin
one byte every 10 ms, decodes what it reads, keeps output without limit, and does not quote `env=`.
A script is sent whole, so a stage costs one round trip. A connection that breaks is `Lost`, never
an exit code, and the next call opens a new one.

Every path is relative to the login's home and names no control character and no `..`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Self

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ops.box.channel import MARK, Deadline, Flood, Input, Output, read_output, send_input
from ops.box.transport import HOST_ALIAS, LINK_ERRORS, WriteFirstKey, make_transport, reason_of
from ops.errors import BoxError, HostKeyChanged, Lost, MilkteaError, NeverReady, Unsuitable
from ops.wait import until

if TYPE_CHECKING:  # see load()
    import fabric

MAX_OUTPUT = 8 << 20  # bytes of stdout and of stderr; no command of ours has more
ANSWER_S = 30.0  # seconds within which the box's sshd starts a command
MIN_TRY_S = 5.0  # that one try to connect may take, however near the deadline is
IDLE_S = 60.0  # seconds for which a stream may stand still

# else paramiko's threads print a traceback of every cut link
logging.getLogger("paramiko").addHandler(logging.NullHandler())


def load() -> None:
    """Import what a connection needs, while a box boots."""
    import fabric  # noqa: F401


def quoted(path: str) -> str:
    """`path` as one shell word.

    Raises ValueError unless it is relative, stays under the home, and is printable."""
    parts = PurePosixPath(path).parts
    unsafe = path.startswith(("/", "~", "-")) or "\\" in path or not path.isprintable()
    if not parts or ".." in parts or unsafe:
        raise ValueError(f"not a path under the login's home: {path!r}")
    return shlex.quote(path)


@dataclass(frozen=True)
class Endpoint:
    """One way to the box's sshd."""

    host: str
    port: int
    kind: Literal["direct", "proxy"] = "direct"

    def __str__(self) -> str:
        return f"{self.kind} {self.host}:{self.port}"


@dataclass(frozen=True)
class Result:
    """What a script did."""

    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode("utf-8", "replace")


class Box:
    """Construction does no I/O. `connect` waits for a box that boots; later calls reconnect once.

    `retry_s` lies between two rounds of `connect`; `patience_s` is how long a transfer may go
    without one new byte."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        user: str,
        key_path: Path,
        known_hosts: Path,
        *,
        retry_s: float = 3.0,
        connect_timeout_s: float = 10.0,
        patience_s: float = 120.0,
    ) -> None:
        self.endpoints = sorted(endpoints, key=lambda e: e.kind != "direct")
        self.user = user
        self.key_path = key_path
        self.known_hosts = known_hosts
        self.retry_s = retry_s
        self.connect_timeout_s = connect_timeout_s
        self.patience_s = patience_s
        self.endpoint: Endpoint | None = None  # the one in use
        self._fabric: fabric.Connection | None = None
        self._ended: MilkteaError | None = None

    def twin(self) -> Box:
        """The same box over a connection of its own, for another thread."""
        return Box(
            self.endpoints,
            self.user,
            self.key_path,
            self.known_hosts,
            retry_s=self.retry_s,
            connect_timeout_s=self.connect_timeout_s,
            patience_s=self.patience_s,
        )

    def condemn(self, why: MilkteaError) -> None:
        """From now on a link that breaks, and each new connection, raises `why`. Like `end`, for
        another thread than the one that uses the box."""
        self._ended = why

    def end(self, why: MilkteaError) -> None:
        """Cut the connection for good: what uses it, now or later, raises `why`."""
        self._ended = why
        fabric = self._fabric
        if fabric is not None:
            with contextlib.suppress(OSError, EOFError):
                fabric.client.close()

    def _raise_ended(self) -> None:
        if self._ended is not None:
            raise self._ended

    @staticmethod
    def make_key(path: Path) -> str:
        """Write a new ed25519 private key in OpenSSH's format, mode 0600; return its public line.

        A key that is already there is kept, so a second call is safe, also after one that was
        killed while it wrote: a key is there whole or not at all."""
        s = serialization
        if path.exists():
            key = s.load_ssh_private_key(path.read_bytes(), password=None)
        else:
            key = Ed25519PrivateKey.generate()
            text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
            part = path.with_name(f"{path.name}.part")
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
        return public.decode() + " milktea"

    # -- the connection ----------------------------------------------------------------------------

    def connect(
        self, deadline_s: float, on_try: Callable[[Endpoint, str], None] | None = None
    ) -> Endpoint:
        """Try direct, then proxy, for `deadline_s` seconds; returns the endpoint that let us in.

        A box that boots refuses, resets and denies keys for minutes: all of that is tried again,
        and reported to `on_try`. Raises NeverReady with the last reason of each endpoint,
        HostKeyChanged at once."""
        deadline = Deadline(deadline_s)
        reasons: list[str] = []  # of each round

        def one_round() -> Endpoint | None:
            reasons.append(self._try_endpoints(deadline, on_try))
            return self.endpoint

        endpoint = until(one_round, every_s=self.retry_s, timeout_s=deadline_s)
        if endpoint is None:
            raise NeverReady(
                f"the box let nobody in for {deadline_s:.0f} s ({len(reasons)} rounds): "
                f"{reasons[-1]}",
                hint="destroy it and take the next offer: its network or image does not work",
            )
        return endpoint

    def reconnect(self) -> None:
        """Open a new connection unless the present one is alive. Raises Lost."""
        if self._fabric is not None and self._fabric.is_connected:
            return
        why = self._try_endpoints(Deadline(math.inf))
        if why:
            raise self._lost(f"the box cannot be reached: {why}")

    def close(self) -> None:
        """End the connection. Safe to call twice, and on a dead link."""
        if self._fabric is not None:
            with contextlib.suppress(OSError, EOFError):
                self._fabric.close()
        self._fabric, self.endpoint = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_endpoints(
        self, deadline: Deadline, on_try: Callable[[Endpoint, str], None] | None = None
    ) -> str:
        """One try at each endpoint, the last good one first. "" when one let us in, else why
        not."""
        self._raise_ended()
        last_good = self.endpoint
        reasons = []
        for endpoint in sorted(self.endpoints, key=lambda e: e != last_good):
            timeout_s = min(self.connect_timeout_s, max(MIN_TRY_S, deadline.left_s()))
            why = self._open(endpoint, timeout_s)
            if not why:
                return ""
            reasons.append(f"{endpoint}: {why}")
            if on_try:
                on_try(endpoint, why)
        return "; ".join(reasons) or "no endpoint is known"

    def _open(self, endpoint: Endpoint, timeout_s: float) -> str:
        """One try. "" when it worked, else why not. Raises HostKeyChanged, or what ended it."""
        import fabric

        self.close()
        connection = fabric.Connection(
            endpoint.host,
            user=self.user,
            port=endpoint.port,
            # nothing of the user's ~/.ssh or ~/.fabric
            config=fabric.Config(overrides={"load_ssh_configs": False}, lazy=True),
            connect_timeout=timeout_s,
            connect_kwargs={
                "key_filename": str(self.key_path),
                "look_for_keys": False,
                "allow_agent": False,
                "banner_timeout": timeout_s,
                "auth_timeout": timeout_s,
                "channel_timeout": ANSWER_S,
                "transport_factory": make_transport,
            },
        )
        self._pin_host_key(connection.client, endpoint)
        try:
            connection.open()
        except paramiko.BadHostKeyException as error:
            connection.client.close()
            raise HostKeyChanged(
                f"{endpoint} shows host key {error.key.fingerprint}, but {self.known_hosts} has "
                f"{error.expected_key.fingerprint}: somebody else answers at the box's address, "
                "nothing was sent to it",
                hint="destroy the box and rent another; the pinned key is never replaced by hand",
            ) from error
        except LINK_ERRORS as error:
            connection.client.close()
            return reason_of(error, timeout_s)
        connection.transport.set_keepalive(15)
        self._fabric, self.endpoint = connection, endpoint
        if self._ended is not None:  # meanwhile, by another thread, which found nothing to cut
            self.close()
            raise self._ended
        return ""

    def _pin_host_key(self, client: paramiko.SSHClient, endpoint: Endpoint) -> None:
        """Let `client` take only the key in known_hosts or, where none is yet, write the first."""
        known = paramiko.HostKeys(str(self.known_hosts) if self.known_hosts.exists() else None)
        port = endpoint.port
        name = endpoint.host if port == 22 else f"[{endpoint.host}]:{port}"  # paramiko's key for it
        for kind, key in (known.lookup(HOST_ALIAS) or {}).items():
            client.get_host_keys().add(name, kind, key)
        client.set_missing_host_key_policy(WriteFirstKey(self.known_hosts))

    def _lost(self, what: str) -> Lost:
        self.close()
        self._raise_ended()
        return Lost(what)

    # -- commands ----------------------------------------------------------------------------------

    def run(self, script: str, *, timeout_s: float = 60.0, input: Input = b"") -> Result:
        """Run `script` with sh in the login's home, without a terminal.

        A non-zero exit is a result. `input` is its stdin. What the script leaves in the background
        must not hold stdout, else this waits `timeout_s` for it. Raises Lost when the link breaks
        or nothing ends within `timeout_s`: the script may then have run, or still run; Unsuitable
        for more than MAX_OUTPUT bytes."""
        return self._exec(script, input, Deadline(timeout_s), Output(MAX_OUTPUT))

    def stream(
        self, script: str, *, input: Input = b"", receive: Callable[[bytes], None] | None = None
    ) -> Result:
        """`run` for much data: stdout goes to `receive` piece by piece.

        Raises Lost when the link breaks or no byte moves either way for IDLE_S, Unsuitable for more
        than MAX_OUTPUT bytes that nobody receives."""
        deadline = Deadline(IDLE_S, idle=True)
        return self._exec(script, input, deadline, Output(MAX_OUTPUT, receive))

    def read_from(self, path: str, offset: int, max_bytes: int = 1 << 20) -> bytes:
        """Up to `max_bytes` (at most MAX_OUTPUT) of a file from byte `offset`.

        b"" where the file is missing or not longer. Raises BoxError when it cannot be read."""
        name = quoted(path)
        done = self.run(
            f"[ -e {name} ] || exit 44; [ -f {name} ] && [ -r {name} ] || exit 45\n"
            f"tail -c +{offset + 1} {name} | head -c {max_bytes}"
        )
        if done.exit_code not in (0, 44):
            why = "not a readable file" if done.exit_code == 45 else done.stderr.strip()
            raise BoxError(f"cannot read {path} on the box: {why}")
        return done.stdout_bytes[:max_bytes]

    def channel_to(self, port: int) -> paramiko.Channel:
        """A channel to a port of the box's own loopback. Raises Lost, and BoxError where nobody
        listens there."""
        self.reconnect()
        assert self._fabric is not None
        try:
            transport: paramiko.Transport = self._fabric.transport
            there = ("127.0.0.1", port)
            return transport.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=ANSWER_S)
        except paramiko.ChannelException as error:
            raise BoxError(f"nobody listens at port {port} of the box: {error}") from error
        except LINK_ERRORS as error:
            raise self._lost(
                f"a channel to port {port}: {str(error) or type(error).__name__}"
            ) from error

    def terminal(self, script: str, kind: str, columns: int, lines: int) -> paramiko.Channel:
        """The channel of `script` on a terminal of the box. Raises Lost."""
        self.reconnect()
        assert self._fabric is not None
        try:
            channel: paramiko.Channel = self._fabric.create_session()
            channel.get_pty(kind, columns, lines)
            channel.exec_command(f"exec sh -c {shlex.quote(f'cd || exit; {script}')}")
            return channel
        except LINK_ERRORS as error:
            raise self._lost(f"a terminal: {str(error) or type(error).__name__}") from error

    def _exec(self, script: str, input: Input, deadline: Deadline, out: Output) -> Result:
        channel = self.command(script)
        err = Output(MAX_OUTPUT)
        sender = threading.Thread(target=send_input, args=(channel, input, deadline), daemon=True)
        sender.start()
        code = -1
        try:
            ended = read_output(channel, out, err, deadline)
            if channel.exit_status_ready():
                code = channel.exit_status
        except Flood as error:
            raise Unsuitable(f"the box answers {error} to: {_first_line(script)}") from error
        except EOFError:  # the link takes nothing more; an OSError is `receive`'s, of our own disk
            ended = True
        finally:
            with contextlib.suppress(OSError, EOFError):  # it writes, and the link may be gone
                channel.close()
            sender.join(5)
        if code == -1:
            why = "the link broke during" if ended else f"no end within {deadline.seconds:.0f} s of"
            raise self._lost(f"{why}: {_first_line(script)}")
        return Result(code, bytes(out.data), bytes(err.data))

    def command(self, script: str) -> paramiko.Channel:
        """The session channel on which `script` runs; channel.START comes before its output, on
        both streams. Raises Lost."""
        self.reconnect()
        assert self._fabric is not None
        # The subshell makes a signal that kills the script an exit code of 128 + n
        # instead of a closed channel.
        wrapped = f"{MARK}; {MARK} >&2; cd || exit\n(\n{script}\n)"
        # paramiko waits for ever for the answer to a request on a link that is dead but not closed
        timer = threading.Timer(ANSWER_S, self._fabric.client.close)
        timer.daemon = True
        timer.start()
        try:
            channel: paramiko.Channel = self._fabric.create_session()
            channel.exec_command(f"exec sh -c {shlex.quote(wrapped)}")
            return channel
        except LINK_ERRORS as error:
            why = str(error) or type(error).__name__
            raise self._lost(f"starting a command: the link broke ({why})") from error
        finally:
            timer.cancel()


def _first_line(script: str) -> str:
    return (script.strip().splitlines() or ["an empty script"])[0][:80]
