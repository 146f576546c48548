"""What our connections ask of paramiko: the first host key kept, fast ciphers, reasons in words."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

import paramiko
from cryptography.exceptions import InvalidTag

HOST_ALIAS = "milktea-box"  # in known_hosts: the direct port and the proxy lead to one sshd
# What a call meets on a link that broke. paramiko's reader hands on whatever it ended with; the
# last five are of bytes that were changed on their way.
LINK_ERRORS = (
    OSError,
    EOFError,
    paramiko.SSHException,
    InvalidTag,
    ValueError,
    LookupError,
    ArithmeticError,
    struct.error,
)
_MAX_PACKET = 1 << 20  # bytes; RFC 4253 asks for 35,000, and paramiko takes 32 KiB of data in one
_WINDOW = 32 << 20  # bytes in flight towards us; paramiko's 2 MiB are 10 MB/s at 200 ms


class BoundedPackets(paramiko.Packetizer):  # type: ignore[misc]  # it is untyped
    """Refuses a packet that is longer than any of SSH's. paramiko believes the length that a packet
    begins with, up to 4 GiB, and reads it into memory before it checks who sent it."""

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if n > _MAX_PACKET:
            raise paramiko.SSHException(f"a packet of {n:,} bytes")
        data: bytes = super().read_all(n, check_rekey)
        return data


class WriteFirstKey(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]  # it is untyped
    """The first key ever seen is written to known_hosts under HOST_ALIAS."""

    def __init__(self, known_hosts: Path) -> None:
        self.known_hosts = known_hosts

    def missing_host_key(self, client: Any, hostname: str, key: paramiko.PKey) -> None:
        with open(self.known_hosts, "a", encoding="ascii") as file:
            file.write(f"{HOST_ALIAS} {key.get_name()} {key.get_base64()}\n")
            file.flush()
            os.fsync(file.fileno())


def make_transport(sock: socket.socket, **kwargs: Any) -> paramiko.Transport:
    """paramiko's transport with a cipher that CPUs have instructions for, and a wide window."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # keepalives unanswered for 30 s: broken, not slow
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    transport = paramiko.Transport(
        sock, default_window_size=_WINDOW, packetizer_class=BoundedPackets, **kwargs
    )
    # paramiko asks for new keys every 512 MiB, and dies of it when a channel closes meanwhile:
    # its reader waits for itself. RFC 4344 allows AES 64 GiB; sshd asks in time on its side.
    transport.packetizer.REKEY_BYTES = 16 << 30
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: not name.startswith("aes128-gcm"))
    return transport


def reason_of(error: BaseException, timeout_s: float) -> str:
    """Why a try to connect failed, in a few words."""
    match error:
        case paramiko.AuthenticationException():
            return "publickey denied"
        case TimeoutError():
            return f"no answer in {timeout_s:.0f} s"
        case ConnectionRefusedError() | paramiko.ssh_exception.NoValidConnectionsError():
            return "refused"
        case ConnectionResetError():
            return "reset"
        case _:
            return f"{error}" or "closed during the handshake"
