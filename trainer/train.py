"""A training process, top to bottom: reads the job, runs its stage, tells how it ended.

    accelerate launch -m trainer.train job.json

Started by trainer.launch, once a process. `job.stage` names a file of trainer/stages; the loop that
all stages share is trainer/loop/step.py; a job of several stages is trainer/chained.py's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from trainer import chained
from trainer.chained import stage_of
from trainer.data.errors import InvalidJob
from trainer.data.template import TemplateError
from trainer.loop import step
from trainer.loop.budget import wants_parts
from trainer.loop.checkpoint import CheckpointError
from trainer.loop.guards import Stopped
from trainer.loop.ranks import Ranks, StopSignal
from trainer.loop.replicas import BaseInParts, Replicas
from trainer.loop.reporter import Reporter
from trainer.loop.sharded import Shards
from trainer.model.parts import ModelError
from trainer.outcome import (
    BROKEN,
    DONE,
    EXIT_FILE,
    EXIT_VARIABLE,
    REFUSED,
    STOPPED,
    TERMINATED,
    Unexpected,
    is_reported,
    report_refusal,
)
from trainer.result.adapter import ResultError
from trainer.wire.job import Job


def run_job(path: Path) -> int:
    """Trains, and returns the exit code. Raises InvalidJob, ModelError, TemplateError,
    CheckpointError before the first step, Stopped and ResultError after it."""
    stop, run = StopSignal(), path.resolve().parent
    job = Job.model_validate_json(path.read_bytes())
    if (run / "result" / "manifest.json").is_file():
        return DONE  # a run that is done is not trained again
    if len(job.stages) > 1:
        ended = chained.train(job, run, join(job, stop, run), started_at())
        return TERMINATED if ended is None else DONE
    stage = stage_of(job, run)
    ranks = join(job, stop, run, stage.longest)
    with closing(Reporter(job, run, first=ranks.rank == 0)) as reporter:
        ended = step.train(job, run, stage, ranks, reporter)
        if ended is not None:
            reporter.finished(ended, started_at())
    return TERMINATED if ended is None else DONE


def join(job: Job, stop: StopSignal, run: Path, longest: int = 0) -> Ranks:
    """This process among those of the run, which `accelerate launch` describes in the environment.
    `longest`: tokens of the longest row."""
    accelerator = Accelerator()
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    if job.training.method == "full" and world > 1:
        return Shards(stop, device, rank, world)
    # an adapter is small: each holds it all
    parts = torch.tensor(int(wants_parts(job, run, longest, device, world)), device=device)
    if world > 1:
        dist.all_reduce(parts, dist.ReduceOp.MAX)
    return (BaseInParts if parts else Replicas)(stop, device, rank, world)


def started_at() -> float:
    """Unix time at which the launcher began."""
    return float(os.environ.get("MILKTEA_STARTED", time.time()))


@dataclass(frozen=True)
class Outcome:
    """How the process ends, and what it says."""

    code: int
    error: Exception | None = None


def outcome_of(path: Path) -> Outcome:
    """Runs the job; whatever it raises becomes a sentence with a hint."""
    try:
        return Outcome(run_job(path))
    except (InvalidJob, ModelError, TemplateError, CheckpointError) as error:
        return Outcome(REFUSED, error)
    except (Stopped, ResultError) as error:
        return Outcome(STOPPED, error)
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        hint = 'report this; meanwhile lower data.max_length or set model.precision = "nf4"'
        return Outcome(BROKEN, Unexpected(f"out of GPU memory: {str(error)[:200]}", hint))
    except Exception as error:
        traceback.print_exc()
        return Outcome(BROKEN, Unexpected.of(error))


def run_and_report(path: Path) -> int:
    """Trains, writes how it ended to every place where that is looked for, and returns the exit
    code."""
    began, outcome, run = started_at(), outcome_of(path), path.resolve().parent
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if outcome.error is not None and reports(outcome, run, began, restarts):
        report_refusal(run, outcome.error)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        (run / os.environ.get(EXIT_VARIABLE, EXIT_FILE)).write_text(json.dumps(outcome.code))
    if dist.is_initialized() and outcome.code == DONE:
        dist.destroy_process_group()
    if outcome.code == STOPPED and restarts:  # all for one reason: torchrun must not try again
        return DONE
    return outcome.code


def reports(outcome: Outcome, run: Path, began: float, restarts: int) -> bool:
    """Whether this process reports why the run ended. What all processes found is reported by rank
    0; what one did not expect by the first that fails, unless torchrun starts them again."""
    if outcome.code != BROKEN:
        return int(os.environ.get("RANK", "0")) == 0
    tried = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return tried >= restarts and not is_reported(run, began)


def main() -> None:
    sys.exit(run_and_report(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
