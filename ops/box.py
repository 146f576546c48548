"""One machine over SSH: connect, run, read, push, pull. The only module that imports fabric.

fabric opens the connection; `run` reads the session channel itself, because `Connection.run` feeds stdin one byte every
10 ms, decodes what it reads, keeps output without limit, and does not quote `env=`. A script is sent whole, so a stage costs one
round trip. A connection that breaks is `Lost`, never an exit code, and the next call opens a new one.

Every path is relative to the login's home and names no control character and no `..`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self

from ops.channel import MARK, Clock, Feed, Sink, Stream, drain, feed_all
from ops.errors import BoxError, HostKeyChanged, Lost, NeverReady

if TYPE_CHECKING:  # see load()
    import fabric
    import paramiko

HOST_ALIAS = "milktea-box"  # one name in known_hosts for the direct port and the proxy, which lead to the same sshd
MAX_OUTPUT = 8 << 20  # bytes kept of stdout and of stderr: a box that talks for ever must not fill our memory
_WINDOW = 32 << 20  # bytes in flight towards us: 2 MiB, paramiko's default, is 10 MB/s at 200 ms
_STILL_RENTED = "the box is still rented"

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else its threads print tracebacks of every cut link


def load() -> None:
    """Imports what a connection needs, 0.3 s that `milktea --help` must not pay and that pass unseen while a box boots."""
    import fabric  # noqa: F401


def quoted(path: str) -> str:
    """`path` as one shell word. Raises ValueError unless it is relative, stays under the home, and is printable."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith(("/", "~", "-")) or ".." in parts or "\\" in path or not path.isprintable():
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
    """What a script did. `truncated`: more than MAX_OUTPUT bytes came, the rest was read and dropped."""

    exit_code: int
    stdout: str
    stderr: str
    truncated: bool = False


class Box:
    """Construction does no I/O. `connect` waits for a box that boots; every later call reconnects once by itself."""

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
        """`retry_s` lies between two rounds of `connect`; `patience_s` is how long a transfer may go without one new byte."""
        self.endpoints = sorted(endpoints, key=lambda e: e.kind != "direct")
        self.user = user
        self.key_path = key_path
        self.known_hosts = known_hosts
        self.retry_s = retry_s
        self.connect_timeout_s = connect_timeout_s
        self.patience_s = patience_s
        self.endpoint: Endpoint | None = None  # the one in use
        self._fabric: fabric.Connection | None = None

    @staticmethod
    def make_key(path: Path) -> str:
        """Write a new ed25519 private key in OpenSSH's format, mode 0600, and return its public line.

        A key that is already there is kept, so a second call is safe."""
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if path.exists():
            key = s.load_ssh_private_key(path.read_bytes(), password=None)
        else:
            key = Ed25519PrivateKey.generate()
            text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
        public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
        return public.decode() + " milktea"

    # -- the connection -----------------------------------------------------------------------------------------------------

    def connect(self, deadline_s: float, on_try: Callable[[Endpoint, str], None] | None = None) -> Endpoint:
        """Try direct, then proxy, again and again for `deadline_s` seconds; returns the endpoint that let us in.

        A box that boots refuses, resets and denies keys for minutes: all of that is tried again, and reported to `on_try`.
        Raises NeverReady with the last word of each endpoint, HostKeyChanged at once."""
        began = time.monotonic()
        last: dict[Endpoint, str] = {}
        tries = 0
        while True:
            for endpoint in self.endpoints:
                tries += 1
                left = began + deadline_s - time.monotonic()
                why = self._open(endpoint, timeout_s=max(0.5, min(self.connect_timeout_s, left)))
                if why is None:
                    return endpoint
                last[endpoint] = why
                if on_try:
                    on_try(endpoint, why)
            if time.monotonic() + self.retry_s - began > deadline_s:
                said = "; ".join(f"{endpoint}: {why}" for endpoint, why in last.items()) or "no endpoint is known"
                raise NeverReady(
                    f"the box let nobody in for {deadline_s:.0f} s ({tries} tries): {said}",
                    money=_STILL_RENTED,
                    hint="destroy it and take the next offer: this machine's network or image does not work",
                )
            time.sleep(self.retry_s)

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

    def reconnect(self) -> None:
        """Open a new connection unless the present one is alive: one try at each endpoint, the last good first. Raises Lost."""
        if self._fabric is not None and self._fabric.is_connected:
            return
        first = self.endpoint
        self.close()  # what was opened on it is dead although the object looks alive
        said = []
        for endpoint in sorted(self.endpoints, key=lambda e: e != first):
            why = self._open(endpoint, timeout_s=self.connect_timeout_s)
            if why is None:
                return
            said.append(f"{endpoint}: {why}")
        raise self._lost("the box cannot be reached: " + "; ".join(said))

    def _open(self, endpoint: Endpoint, timeout_s: float) -> str | None:
        """One attempt; None when it worked, else the reason in a few words."""
        import fabric
        import paramiko

        self.close()
        connection = fabric.Connection(
            endpoint.host,
            user=self.user,
            port=endpoint.port,
            config=fabric.Config(overrides={"load_ssh_configs": False}, lazy=True),  # nothing of the user's ~/.ssh or ~/.fabric
            connect_timeout=timeout_s,
            connect_kwargs={
                "key_filename": str(self.key_path),
                "look_for_keys": False,
                "allow_agent": False,
                "banner_timeout": timeout_s,
                "auth_timeout": timeout_s,
                "channel_timeout": 30,
                "transport_factory": _transport,
            },
        )
        self._trust(connection.client, endpoint)
        try:
            connection.open()
        except paramiko.BadHostKeyException as error:
            connection.client.close()
            raise self._changed(endpoint, error.key, error.expected_key) from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            connection.client.close()
            return _reason(error, timeout_s)
        connection.transport.set_keepalive(15)
        self._fabric, self.endpoint = connection, endpoint
        return None

    def _trust(self, client: paramiko.SSHClient, endpoint: Endpoint) -> None:
        """The first key ever seen is written to known_hosts under HOST_ALIAS; from then on only that key is taken."""
        import paramiko

        pinned = paramiko.HostKeys(str(self.known_hosts)).lookup(HOST_ALIAS) if self.known_hosts.exists() else None
        name = endpoint.host if endpoint.port == 22 else f"[{endpoint.host}]:{endpoint.port}"
        for kind, key in (pinned or {}).items():
            client.get_host_keys().add(name, kind, key)
        path = self.known_hosts

        class PinFirst(paramiko.MissingHostKeyPolicy):
            def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
                with open(path, "a", encoding="ascii") as file:
                    file.write(f"{HOST_ALIAS} {key.get_name()} {key.get_base64()}\n")
                    file.flush()
                    os.fsync(file.fileno())

        client.set_missing_host_key_policy(PinFirst())

    def _changed(self, endpoint: Endpoint, got: paramiko.PKey, pinned: paramiko.PKey) -> HostKeyChanged:
        return HostKeyChanged(
            f"{endpoint} shows host key {got.fingerprint}, but {self.known_hosts} has {pinned.fingerprint}: "
            "somebody else answers at the box's address, nothing was sent to it",
            money=_STILL_RENTED,
            hint="destroy the box and rent another; the pinned key is never replaced by hand",
        )

    def _lost(self, what: str) -> Lost:
        self.close()
        return Lost(what, money=_STILL_RENTED)

    # -- commands -----------------------------------------------------------------------------------------------------------

    def run(self, script: str, *, timeout_s: float = 60.0, input: Feed = None) -> Result:
        """Run `script` with sh in the login's home, without a terminal; a non-zero exit is a result.

        `input` is its stdin. What the script leaves in the background must not hold stdout, else this waits `timeout_s` for it.
        Raises Lost when the link breaks or nothing ends within `timeout_s`: the script may then have run, or still run."""
        code, out, err, cut = self._exec(script, timeout_s, input, MAX_OUTPUT)
        return Result(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), cut)

    def read_from(self, path: str, offset: int, max_bytes: int = 1 << 20) -> bytes:
        """Up to `max_bytes` bytes of a file from byte `offset`; b"" where the file is missing or not longer than that."""
        name = quoted(path)
        script = f"[ -e {name} ] || exit 44; [ -f {name} ] && [ -r {name} ] || exit 45\n"
        script += f"tail -c +{offset + 1} {name} | head -c {max_bytes}"
        code, out, err, _ = self._exec(script, 60.0, None, max_bytes)
        if code not in (0, 44):
            why = "not a readable file" if code == 45 else err.decode("utf-8", "replace").strip()
            raise BoxError(f"cannot read {path} on the box: {why}", money=_STILL_RENTED)
        return out

    @contextlib.contextmanager
    def _answers_within(self, seconds: float) -> Iterator[None]:
        """paramiko waits for ever for the answer to a request on a link that is dead but not closed: close it."""
        assert self._fabric is not None
        timer = threading.Timer(seconds, self._fabric.client.close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _link_errors(self, doing: str) -> Iterator[None]:
        """Inside, what the library raises for a broken link becomes Lost."""
        import paramiko

        try:
            yield
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost(f"{doing}: the link broke ({error or type(error).__name__})") from error

    def ssh_options(self) -> list[str]:
        """OpenSSH options that lead to the very same box with the same pinned key, and read nothing of the user's own set-up."""
        self.reconnect()
        assert self.endpoint is not None
        options = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": f'"{self.known_hosts.resolve()}"',
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": HOST_ALIAS,
            "ConnectTimeout": f"{self.connect_timeout_s:.0f}",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "2",
            "Ciphers": "^aes128-gcm@openssh.com",
            "Compression": "no",
            "LogLevel": "ERROR",
        }
        flags = ["-F", "/dev/null", "-i", str(self.key_path.resolve()), "-p", str(self.endpoint.port)]
        return flags + [part for key, value in options.items() for part in ("-o", f"{key}={value}")]

    def stream(self, script: str, *, sink: Sink | None = None, feed: Iterable[bytes] = ()) -> Result:
        """`run` for much data: `feed` goes to stdin, stdout to `sink`; Lost only after a minute without a byte either way."""
        code, out, err, cut = self._exec(script, 60.0, feed, MAX_OUTPUT, sink, idle=True)
        return Result(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), cut)

    def _exec(
        self, script: str, timeout_s: float, feed: Feed, limit: int, sink: Sink | None = None, idle: bool = False
    ) -> tuple[int, bytes, bytes, bool]:
        self.reconnect()
        assert self._fabric is not None
        # The subshell makes a signal that kills the script an exit code of 128 + n instead of a closed channel.
        whole = f"{MARK}; {MARK} >&2; cd || exit\n(\n{script}\n)"
        with self._link_errors("starting a command"), self._answers_within(30):
            channel = self._fabric.create_session()
            channel.exec_command(f"exec sh -c {shlex.quote(whole)}")
        out, err = Stream(limit, sink), Stream(limit)
        clock = Clock(timeout_s, idle)
        feeder = threading.Thread(target=feed_all, args=(channel, feed, clock), daemon=True)
        feeder.start()
        try:
            ended = drain(channel, out, err, clock)
            code = channel.exit_status if channel.exit_status_ready() else -1
        except EOFError:  # paramiko's word for a link that takes nothing more; an OSError is the sink's, of our own disk
            ended, code = True, -1
        finally:
            with contextlib.suppress(OSError, EOFError):  # it writes, and the link may be gone
                channel.close()
            feeder.join(5)
        if code == -1:
            about = script.strip().splitlines()[0][:80] if script.strip() else "an empty script"
            raise self._lost(f"the link broke during: {about}" if ended else f"no end within {timeout_s:.0f} s of: {about}")
        return code, bytes(out.kept), bytes(err.kept), out.cut or err.cut


def _transport(sock: socket.socket, **kwargs: Any) -> paramiko.Transport:
    """paramiko's transport with a cipher that the CPU has instructions for, and room for a long fat link."""
    import paramiko

    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a link that swallows our keepalives for 30 s is broken, not slow
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    transport = paramiko.Transport(sock, default_window_size=_WINDOW, **kwargs)
    # paramiko asks for new keys every 512 MiB, and dies of it when a channel closes meanwhile: its reader waits for itself.
    # RFC 4344 allows AES 64 GiB; sshd asks in time on its side.
    transport.packetizer.REKEY_BYTES = 16 << 30
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: not name.startswith("aes128-gcm"))
    return transport


def _reason(error: BaseException, timeout_s: float) -> str:
    import paramiko

    if isinstance(error, paramiko.AuthenticationException):
        return "publickey denied"
    if isinstance(error, TimeoutError):
        return f"no answer in {timeout_s:.0f} s"
    if isinstance(error, ConnectionRefusedError | paramiko.ssh_exception.NoValidConnectionsError):
        return "refused"
    if isinstance(error, ConnectionResetError):
        return "reset"
    return f"{error}" or "closed during the handshake"
