"""The base that a job trains on: its model, with the adapters that the job merges into it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.data.prepare import model_folder
from trainer.loop.ranks import Ranks
from trainer.model.parts import ModelError
from trainer.result.adapter import identity
from trainer.result.merge import merge
from trainer.result.merge_plan import MergeError
from trainer.wire.chain import chain_of
from trainer.wire.job import Job


def base_of(job: Job, run: Path, ranks: Ranks) -> Path:
    """The folder of the base. Where the job merges adapters into it, rank 0 makes that folder once:
    every weight in fp32, cast at the end. Collective. Raises ModelError for an adapter that was
    trained on another base, or that cannot be merged."""
    base = model_folder(job, run, weights=True)
    if not job.merged:
        return base
    made = run / job.merged_base
    if ranks.rank == 0 and not made.is_dir():
        _merge(job, run, base, made)
    ranks.gather(None)
    return made


def _merge(job: Job, run: Path, base: Path, made: Path) -> None:
    final = "fp32" if job.model.precision == "fp32" else "bf16"
    steps = [made.with_name(f"{made.name}.step{n}") for n in range(len(job.merged) - 1)] + [made]
    at = base
    for number, (told, out) in enumerate(zip(job.merged, steps, strict=True)):
        chain = chain_of(run / told.path)
        if number == 0 and chain is not None and chain.base_sha256 != identity(base):
            raise ModelError(
                f"{told.name} was trained on other weights than those of {job.model.base} here: "
                "merge it into its own base"
            )
        shutil.rmtree(out, ignore_errors=True)
        try:
            merge(run / told.path, at, out, final if out is made else "fp32")
        except MergeError as why:
            raise ModelError(f"{told.name} cannot be merged into {job.model.base}: {why}") from why
        if at is not base:
            shutil.rmtree(at)
        at = out
