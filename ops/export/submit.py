"""Hand an exported job to the Slurm of this machine."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from ops.errors import PreflightError

ANSWER_S = 60.0  # for Slurm's commands
_BATCH = "train.sbatch"


@dataclass(frozen=True)
class Queued:
    """A job of Slurm's. `folder` is its run folder, which all nodes must see."""

    folder: Path
    number: str

    @property
    def adapter(self) -> Path | None:
        """Its result, or None until there is one. Nothing is copied."""
        path = self.folder / "result" / "adapter.zip"
        return path if path.is_file() else None

    @property
    def state(self) -> str:
        """Slurm's word: PENDING, RUNNING, ...; "" once Slurm does not list it any more."""
        done = _run("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T", folder=self.folder)
        return done.stdout.strip() if done.returncode == 0 else ""

    def cancel(self) -> None:
        """End it for good. Raises PreflightError where Slurm refuses."""
        _answer(_run("scancel", self.number, folder=self.folder))


def submit(folder: Path) -> Queued:
    """Submit the batch file of this folder, which `export` wrote. Raises PreflightError where this
    machine has no Slurm, or where it refuses."""
    told = _answer(_run("sbatch", "--parsable", _BATCH, folder=folder))
    return Queued(folder, told.strip().partition(";")[0])  # NUMBER;CLUSTER


def _run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except FileNotFoundError as e:
        raise no_slurm(words[0]) from e
    except subprocess.TimeoutExpired as e:
        raise PreflightError(
            f"{words[0]} did not answer for {ANSWER_S:.0f} s",
            money="unknown: the job may be queued",
            hint="`squeue --me` shows what Slurm has",
        ) from e


def no_slurm(tool: str) -> PreflightError:
    return PreflightError(
        f"this machine has no {tool}: no Slurm to hand the job to",
        hint='job.export("slurm") writes the folder; `sbatch train.sbatch` in it on a login node',
    )


def _answer(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        told = (done.stderr or done.stdout).strip()[:400]
        raise PreflightError(
            f"{done.args[0]} refused: {told}", hint="Slurm's own words stand above"
        )
    return done.stdout
