"""Inside the image: one training in its run folder, its words and its progress on stdout and in
log.txt, SIGTERM passed on.

    python run_job.py    in the run folder; ends with the trainer's exit code, as exit_code says
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

LOG_BYTES = 64_000_000  # then the log is begun anew; the one before stays as log.txt.1


def main() -> int:
    """Start trainer.launch, copy what it says, write exit_code where it could not."""
    code_file = Path("exit_code")
    code_file.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "trainer.launch", "job.json"]
    os.environ["MILKTEA_TELL"] = "1"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as trainer:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: trainer.send_signal(number))
        assert trainer.stdout is not None
        log = Path("log.txt")
        log.touch()
        for line in trainer.stdout:
            if log.stat().st_size > LOG_BYTES:
                log.replace("log.txt.1")
            with log.open("ab") as file:
                file.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    if not code_file.is_file():
        part = Path("exit_code.new")
        part.write_text(f"{trainer.returncode}\n")
        part.replace(code_file)
    return trainer.returncode


if __name__ == "__main__":
    sys.exit(main())
