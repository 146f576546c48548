"""Runs the stages of a job one after the other in one process. Each stage starts from the adapter
of the stage before; the base is read once.

Stage N of name NAME works in stages/N-NAME of the run folder, with its own checkpoints and result,
like a job of one stage in its run folder. A stage with a complete result is not trained again.
result/ of the run is that of the last stage, with facts of every stage.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from trainer.loop import step
from trainer.loop.guards import Stopped
from trainer.loop.ranks import Ranks
from trainer.loop.reporter import Ended, Reporter
from trainer.loop.stage import Stage
from trainer.model.kept import KeptBase
from trainer.result.adapter import ResultError
from trainer.wire import events
from trainer.wire.adapters import files_of
from trainer.wire.chain import MIN_ACCURACY, weights_sha256
from trainer.wire.digest import sha256_of
from trainer.wire.job import Job

ARCHIVE = "adapter.zip"
OF_A_STAGE = ("steps", "final_loss", "data_sha256", "held_out", "chain", "template", "curve")


def stage_of(job: Job, run: Path) -> Stage:
    """The stage that a job names, with its data. Raises InvalidJob, TemplateError, Stopped."""
    made: Stage = importlib.import_module(f"trainer.stages.{job.stage}").Stage(job, run)
    return made


def train(job: Job, run: Path, ranks: Ranks, began: float) -> Ended | None:
    """Train the stages that have no result yet, and write the run's result; None when asked to stop
    before. Raises what a stage raises, and Stopped where a stage's held-out scores fail its gate.
    Collective."""
    kept, sha256s = KeptBase(), dict[int, str]()
    for number in range(len(job.stages)):
        folder = run / job.folder(number)
        if not is_whole(folder) and not _train(job, number, run, sha256s, ranks, kept):
            return None
        ranks.gather(None)  # rank 0 has written the result
        if ranks.rank == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            files_of(folder / "result" / ARCHIVE, folder / "adapter")
        ranks.gather(None)
        sha256s[number] = weights_sha256(folder / "adapter")
        ended = _tell(job, number, run, ranks)
        if why := gate_defect(job, number, ended.numbers):
            raise Stopped(
                f"{why}: the {len(job.stages) - number - 1} stages after it are not trained",
                [],
                "the results of the stages so far come home; look at their data, or lower "
                "min_accuracy, raise max_loss, or set foreign_reward = true in the job file",
            )
    last = Ended(ended.steps, ended.final_loss)
    if ranks.rank == 0:
        last = _write_result(job, run, last)
        with closing(Reporter(job, run, first=True)) as reporter:
            reporter.finished(last, began)
    return last


def _train(
    job: Job, number: int, run: Path, sha256s: dict[int, str], ranks: Ranks, kept: KeptBase
) -> bool:
    """Train one stage to its result; False when asked to stop."""
    part, folder = job.part(number, sha256s), run / job.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    stage = stage_of(part, folder)
    stage.kept = kept
    place = {"stage": part.stage, "number": number + 1, "stages": len(job.stages)}
    with closing(Reporter(part, folder, first=ranks.rank == 0, home=run, place=place)) as reporter:
        ended = step.train(part, folder, stage, ranks, reporter)
    del stage
    gc.collect()  # frees its optimizer and gradients for the next stage
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return ended is not None


def is_whole(folder: Path) -> bool:
    """Whether a stage's folder has its result. Raises ResultError where the result differs from its
    manifest."""
    manifest = folder / "result" / "manifest.json"
    if not manifest.is_file():
        return False
    listed = json.loads(manifest.read_text())["files"][ARCHIVE]["sha256"]
    if sha256_of(folder / "result" / ARCHIVE) != listed:
        raise ResultError(f"{folder.name}/result/{ARCHIVE} is not the one that its manifest lists")
    return True


def _tell(job: Job, number: int, run: Path, ranks: Ranks) -> events.StageEnded:
    """Emit the event that a stage has ended, at each start of the run: a follower may have missed
    it."""
    result = run / job.folder(number) / "result"
    manifest = json.loads((result / "manifest.json").read_text())
    told: dict[str, Any] = {
        "stage": job.stages[number].name,
        "number": number + 1,
        "stages": len(job.stages),
        "path": result.relative_to(run).as_posix(),
        "manifest_sha256": sha256_of(result / "manifest.json"),
        "steps": manifest["steps"],
        "final_loss": manifest["final_loss"],
        "numbers": {name: after for name, (_, after) in manifest.get("held_out", {}).items()},
    }
    if ranks.rank == 0:
        log = events.EventWriter(run / "events.jsonl")
        log.write(events.StageEnded, **told)
        log.close()
    return events.StageEnded(t=time.time(), **told)


def gate_defect(job: Job, number: int, numbers: dict[str, float]) -> str:
    """Why the run must end after stage `number`, given its held-out `numbers`; empty where it
    continues."""
    stage, after = job.stages[number], range(number + 1, len(job.stages))
    name, least = f"stage {number + 1}, {stage.name}", stage.min_accuracy
    judged = [n for n in after if job.judged_by(n) == number]
    if least is None and any(not getattr(job, job.stages[n].name).foreign_reward for n in judged):
        least = MIN_ACCURACY if "accuracy" in numbers else None
    for key, bound, beyond in (("accuracy", least, -1), ("loss", stage.max_loss, 1)):
        if bound is None:
            continue
        if key not in numbers:
            return f"{name}: no held-out row gave the {key} that its gate asks"
        if (numbers[key] - bound) * beyond > 0:
            words = "less" if beyond < 0 else "more"
            return f"{name}: {key} {numbers[key]:.4g} on held-out rows, {words} than {bound:g}"
    return ""


def _write_result(job: Job, run: Path, last: Ended) -> Ended:
    """Write result/ of the run: the files of the last stage's result, and a manifest with facts of
    every stage."""
    folders = [run / job.folder(n) / "result" for n in range(len(job.stages))]
    manifests = [json.loads((f / "manifest.json").read_text()) for f in folders]
    made, result = run / ".result", run / "result"
    for old in (made, result):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(
        folders[-1], made, copy_function=shutil.copyfile, ignore=lambda *_: ["manifest.json"]
    )
    told = [
        {"stage": stage.name, "folder": job.folder(n), "manifest_sha256": sha256_of(f)}
        | {"adapter_sha256": manifest["files"][ARCHIVE]["sha256"]}
        | {key: manifest[key] for key in OF_A_STAGE if key in manifest}
        for n, (stage, manifest) in enumerate(zip(job.stages, manifests, strict=True))
        for f in [folders[n] / "manifest.json"]
    ]
    whole = manifests[-1] | {"stages": told}
    made.rename(result)
    part = result / ".manifest.part"
    part.write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
    part.rename(result / "manifest.json")
    return Ended(last.steps, last.final_loss, told[-1]["adapter_sha256"])
