"""`milktea`, and `python -m ops.cli`: before anything large is imported, Ctrl-C is made to end it
without a word."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """`milktea`. Exits with 130 where it is interrupted while it loads."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(130)  # nothing was begun: an exception could end in a module half loaded

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's `&` leaves it
        signal.signal(signal.SIGINT, leave)
    from ops.cli.app import main as run

    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
