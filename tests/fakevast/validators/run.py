"""Runs other people's vast.ai clients against the emulator; see README.md beside it. Standard
library only."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VENV = ROOT / ".venv-validators"
PYTHON = VENV / "bin" / "python"
PACKAGES = [
    "vastai==1.9.1",
    "vastai-sdk==1.9.1",
    "pytest",
    "snakemake>=9.22",
    "snakemake-executor-plugin-vastai==0.1.4",
]
SNAKEMAKE, SKYPILOT = "snakemake-executor-plugin-vastai==0.1.4", "skypilot==0.14.1"
NAMES = ("vastai", "live", "snakemake", "skypilot")

# A throw-away layer over this machine's files, for a client that writes where a rented machine
# would let it. $1 is a tmpfs.
OVERLAY = """
set -e
mount -t tmpfs tmpfs "$1"; mkdir "$1/up" "$1/work" "$1/all"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/all"
for path in $(
  awk '$2 ~ "^/." && $3 !~ /overlay|squashfs/ {print $2}' /proc/mounts | grep -v "^$1"
); do
  [ -e "$1/all$path" ] && mount --rbind "$path" "$1/all$path" 2>/dev/null || true
done
here=$PWD; shift 1
exec chroot "$ROOT_OF_ALL" sh -c 'cd "$0" && exec "$@"' "$here" "$@"
"""


def environment() -> None:
    """The validators' own venv, made once."""
    if (VENV / "complete").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(PYTHON), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    (VENV / "complete").touch()


def download(what: str, folder: Path, *options: str) -> Path:
    subprocess.run(
        [
            str(PYTHON),
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            *options,
            "-d",
            str(folder),
            what,
        ],
        check=True,
    )
    return next(path for path in folder.iterdir() if path.suffix in (".gz", ".whl"))


class Trial:
    """One client's run: a folder, an emulator in it, and the environment that points the client
    there."""

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self.folder = work / name
        self.folder.mkdir()

    def run(
        self, command: list[str], *emulator_options: str, sandbox: bool = False, **env: str
    ) -> int:
        """Runs the client beside a fresh emulator; returns its exit code, or 1 when an instance was
        left behind."""
        script = [
            sys.executable,
            str(HERE / "beside.py"),
            str(self.folder / "state"),
            " ".join(emulator_options),
            *command,
        ]
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("VAST", "PYTHON"))
        }
        clean |= {
            "HOME": str(self.folder),
            "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "VASTAI_NO_UPDATE_CHECK": "1",
            **env,
        }
        if sandbox:
            layer = Path(tempfile.mkdtemp(prefix="layer-"))
            clean["ROOT_OF_ALL"] = f"{layer}/all"
            script = [
                "unshare",
                "-m",
                *([] if os.geteuid() == 0 else ["-r"]),
                "sh",
                "-c",
                OVERLAY,
                "sandbox",
                str(layer),
                *script,
            ]
        return subprocess.run(script, cwd=self.folder, env=clean, check=False).returncode


def validate(name: str, work: Path, vast_cli: Path | None) -> int:
    trial = Trial(name, work)
    if name == "vastai":
        return trial.run([str(PYTHON), str(HERE / "vastai_life.py")])
    if name == "skypilot":
        with zipfile.ZipFile(download(SKYPILOT, trial.folder / "dist")) as wheel:
            wheel.extractall(
                trial.folder / "wheel",
                [
                    item
                    for item in wheel.namelist()
                    if item.startswith("sky/") and item.endswith(".py")
                ],
            )
        return trial.run(
            [str(PYTHON), str(HERE / "skypilot_functions.py"), str(trial.folder / "wheel")]
        )
    if name == "snakemake":
        with tarfile.open(
            download(SNAKEMAKE, trial.folder / "dist", "--no-binary", SNAKEMAKE.split("==")[0])
        ) as sdist:
            sdist.extractall(trial.folder, filter="data")
        test = next(trial.folder.glob("*/tests/test_e2e.py"))
        command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
        return trial.run(
            command, "--share /snakemake-workdir", sandbox=True, SNAKEMAKE_VASTAI_E2E="1"
        )
    checkout = vast_cli or clone(trial.folder / "vast-cli")
    # away from the checkout, whose older vastai would be imported instead
    tests = trial.folder / "copy" / "tests"
    shutil.copytree(checkout / "tests" / "live", tests / "live")
    shutil.copy(checkout / "tests" / "conftest.py", tests)
    return trial.run(
        [
            str(PYTHON),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "--rootdir",
            str(tests),
            str(tests / "live"),
        ]
    )


def clone(target: Path) -> Path:
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", "https://github.com/vast-ai/vast-cli", str(target)],
        check=True,
    )
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        default=NAMES,
        metavar="NAME",
        help=f"which of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument(
        "--vast-cli", type=Path, help="a checkout of vast-ai/vast-cli, where it cannot be cloned"
    )
    options = parser.parse_args()
    environment()
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="validators-") as work:
        for name in options.names:
            print(f"== {name}", flush=True)
            start = time.monotonic()
            try:
                code = validate(name, Path(work), options.vast_cli)
                results[name] = (
                    f"{'passed' if code == 0 else f'FAILED ({code})'} in "
                    f"{time.monotonic() - start:.0f} s"
                )
            except (subprocess.CalledProcessError, StopIteration) as error:
                failed = isinstance(error, subprocess.CalledProcessError)
                results[name] = f"NOT RUN: {shlex.join(error.cmd) if failed else error}"
    print("\n".join(f"{name:10} {result}" for name, result in results.items()))
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
