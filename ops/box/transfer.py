"""What a push and a pull share: progress, patience over links that break, sha256 on the box.

Each attempt asks the box first what is whole there, so a cut link costs what was in flight. What
moves slower than MIN_BYTES_S stands still."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.box.connection import Box
from ops.errors import BoxError, Lost
from ops.wait import until
from trainer.wire.digest import sha256_of as sha256_of

Progress = Callable[[int, int], None]  # bytes done, bytes in all

PART = ".part"
MIN_BYTES_S = 8 << 10  # less, over a box's patience, is no transfer
HASH_BYTES_S = 20e6  # of a slow box
# OpenSSL's is four times coreutils' where the CPU has SHA instructions. Both print `HEX *NAME`
# for each name on stdin.
_SHA256 = """
if command -v openssl >/dev/null; then xargs -0 -r openssl dgst -sha256 -r 2>/dev/null
else xargs -0 -r sha256sum -b 2>/dev/null
fi || true"""


@dataclass(frozen=True)
class PushFile:
    """A local file, its place under the login's home, and the sha256 that it must have there."""

    local: Path
    remote: str
    sha256: str


def remote_sha256(box: Box, names: Sequence[str], size_bytes: int = 0) -> dict[str, str]:
    """sha256 of files on the box by name; a name that cannot be read is left out. Raises Lost when
    `size_bytes` take longer than a slow box needs."""
    if not names:
        return {}
    timeout_s = 60 + size_bytes / HASH_BYTES_S
    rows = box.run(_SHA256, input="\0".join(names), timeout_s=timeout_s).stdout.splitlines()
    return {row[66:]: row[:64] for row in rows if re.match(r"[0-9a-f]{64} \*", row)}


class TransferMeter:
    """Bytes done of `total`, as the user sees them, and when enough new ones last came."""

    def __init__(self, total: int, progress: Progress | None, patience_s: float) -> None:
        self.total, self.progress, self.patience_s = total, progress, patience_s
        self.done = self.due = 0  # bytes done; bytes at which something has moved
        self.moved = time.monotonic()

    def at(self, done: int) -> None:
        self.done = min(done, self.total)
        if self.done >= self.due:
            self.moved = time.monotonic()
            self.due = self.done + max(1, int(MIN_BYTES_S * self.patience_s))
        if self.progress:
            self.progress(self.done, self.total)

    @property
    def stands_still(self) -> bool:
        return time.monotonic() - self.moved > self.patience_s

    def add(self, count: int) -> None:
        self.at(self.done + count)


def retry(box: Box, meter: TransferMeter, attempt: Callable[[], None]) -> None:
    """`attempt` over links that break, as long as enough new bytes come within the box's
    patience."""

    def once() -> bool | None:
        try:
            attempt()
        except Lost:
            if meter.stands_still:
                raise
            return None
        return True

    until(once, every_s=min(box.retry_s, 1.0))


def stream(box: Box, what: str, script: str, error: type[BoxError] = BoxError, **how: Any) -> None:
    done = box.stream(script, **how)
    if done.exit_code:
        raise error(f"{what} on the box: {done.stderr.strip()[-500:]}")
