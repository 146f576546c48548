"""The trainer's tests on every pair of torch and transformers that milktea runs on somewhere.

    python tests/versions.py [ROW...]      rows: laptop, box, and every image of images/

Each row has an environment of its own, `.venv-versions/ROW`: the versions of requirements.lock (the
laptop's, and what a box gets that has torch only), or those that an image's lock pins. torch is its
CPU build where PyTorch's index can be reached; PyPI's build runs on the CPU too, and takes 6 GB. A
row whose torch cannot be had on this machine is not run, and says so.
Exit: 0 every row is green, 1 a row failed, 3 none failed but some could not be had.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
LOCK = ROOT / "requirements.lock"
IMAGES = sorted((ROOT / "images").glob("*.lock"))

# The machine of the figures in bench/results/ has its own torch, and our trainer is pushed to it.
BOX_TORCH = "2.11.0"
NO_TORCH = 4  # exit code of .ci/setup.sh: torch in this version is nowhere
# what an image brings for the GPU, and pip itself: no part of a row
NOT_OURS = re.compile(r"torch$|triton$|pip$|nvidia-|cuda-")


@dataclass(frozen=True)
class Row:
    """One line of the table "What is run where" in docs/architecture.md."""

    name: str
    torch: str
    transformers: str
    pins: tuple[str, ...]  # an image's wheels as pip's requirement lines; () for requirements.lock


def rows() -> dict[str, Row]:
    """Every row by name, as the locks have them."""
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE))
    found = [
        Row("laptop", locked["torch"], locked["transformers"], ()),
        Row("box", BOX_TORCH, locked["transformers"], ()),
        *(_of_image(path) for path in IMAGES),
    ]
    return {row.name: row for row in found}


def _of_image(path: Path) -> Row:
    wheels = {w["name"]: w for w in tomllib.loads(path.read_text())["wheels"]}
    # the lock knows the hashes of the files that the image installs, and of no others
    same_files = sys.version_info[:2] == (3, 11) and (sys.platform, platform.machine()) == (
        "linux",
        "x86_64",
    )
    pins = tuple(
        f"{name}=={wheel['version']}" + (f" --hash=sha256:{wheel['sha256']}" if same_files else "")
        for name, wheel in wheels.items()
        if not NOT_OURS.match(name)
    )
    torch = wheels["torch"]["version"].split("+")[0]
    return Row(path.stem, torch, wheels["transformers"]["version"], pins)


def set_up(row: Row) -> int:
    """Make the row's environment, or bring it up to date: 0, or the exit code of what failed."""
    venv = ENVIRONMENTS / row.name
    wanted = hashlib.sha256(f"{row}{LOCK.read_text()}".encode()).hexdigest()
    ready = venv / "ready"
    if ready.exists() and ready.read_text() == wanted:
        return 0
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    code = subprocess.run([ROOT / ".ci/setup.sh", venv, row.torch], cwd=ROOT).returncode
    if code == 0 and row.pins:
        requirements = venv / "pins.txt"
        requirements.write_text("\n".join(row.pins) + "\n")
        install = [venv / "bin/pip", "-qq", "install", "--no-deps", "-r", requirements]
        code = subprocess.run(install).returncode
    if code == 0:
        ready.write_text(wanted)
    return code


def run(row: Row) -> tuple[int, str]:
    """Run the tests of tests/trainer in the row's environment: pytest's exit code and last line."""
    command = [ENVIRONMENTS / row.name / "bin/python", "-m", "pytest", "tests/trainer", "-n", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        line = ""
        for line in tests.stdout:
            print(line, end="", flush=True)
    return tests.returncode, line.strip()


def main() -> int:
    table = rows()
    parser = argparse.ArgumentParser(description="the trainer's tests on other versions")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(table)}; all")
    names = parser.parse_args().rows or list(table)
    if unknown := [name for name in names if name not in table]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(table)}")
    lines, codes = [], []
    for name in names:
        row, began = table[name], time.monotonic()
        title = f"{name}: torch {row.torch}, transformers {row.transformers}"
        print(f"== {title}", flush=True)
        code = set_up(row)
        made = time.monotonic()
        if code == NO_TORCH:
            outcome, code = "NOT RUN: this torch cannot be had on this machine", 3
        elif code:
            outcome, code = "FAILED to install", 1
        else:
            code, line = run(row)
            outcome = f"{'green' if code == 0 else 'FAILED'}: {line}"
        install, tests = (made - began) / 60, (time.monotonic() - made) / 60
        lines.append(f"{title}: {outcome} ({install:.1f} min to install, {tests:.1f} to run)")
        codes.append(code)
    print("\n".join(lines))
    return 1 if any(code not in (0, 3) for code in codes) else max(codes)


if __name__ == "__main__":
    sys.exit(main())
