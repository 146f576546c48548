"""`beside.py STATE "EMULATOR OPTIONS" COMMAND ...`: the command beside a fresh emulator, with
VAST_URL and VAST_API_KEY set.

Exits with the command's code, or 99 when it left an instance behind.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from ops.fakevast.embedded import ensure


def main() -> int:
    state, options, command = Path(sys.argv[1]), shlex.split(sys.argv[2]), sys.argv[3:]
    server = ensure(state, options=("--boot-s", "1", "--no-rate-limits", *options))
    try:
        code = subprocess.run(
            command,
            env=os.environ | {"VAST_URL": server.url, "VAST_API_KEY": server.api_key},
            check=False,
        ).returncode
        key = {"Authorization": f"Bearer {server.api_key}"}
        asked = urllib.request.Request(f"{server.url}/_fake/instances", headers=key)
        with urllib.request.urlopen(asked, timeout=10) as reply:
            left = [row["id"] for row in json.load(reply)]
        if left:
            print(f"left behind: {left}")
        return code or (99 if left else 0)
    finally:
        os.kill(json.loads((state / "server.json").read_text())["pid"], signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
