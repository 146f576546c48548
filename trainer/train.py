"""The training run, top to bottom: job -> data -> model -> loop -> result. Started by trainer.launch, once a process.

    accelerate launch -m trainer.train job.json

A step is `training.batch_size` rows of one global order. Ranks take shares of it with level token counts, pack them, and add up their
gradients of summed losses, each divided by the target tokens of the whole step. So the result does not depend on the number of processes,
on micro-batches, or on where a run was resumed (beyond the order of floating-point additions).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trainer import artefact, batch, checkpoint, evaluate, events, memory, packing, report
from trainer.dropout import TokenKeys
from trainer.job import Job
from trainer.model import ModelError, hidden_states, load, start_values, target_loss
from trainer.optim import Gradients, adamw
from trainer.outcome import DONE, EXIT_FILE, EXIT_VARIABLE, STOPPED, TERMINATED, refuse
from trainer.prepare import Prepared, Refused, Rows, model_folder, prepare
from trainer.progress import Launched, Progress, Reading, tell_checkpoint
from trainer.prompt import TemplateError
from trainer.schedule import learning_rate
from trainer.watchdog import Stopped, Watchdog, check_labels, probe

CPU_TOKENS = 2048  # tokens of a micro-batch where there is no GPU memory to fill
GPU_TOKENS = 16384  # at most; the memory oracle says how many fit
HOST = torch.device("cpu")


def run_job(path: Path) -> int:
    """Trains, and returns the exit code. Raises Refused, ModelError, CheckpointError before the first step, Stopped after it."""
    began = float(os.environ.get("MILKTEA_STARTED", time.time()))
    run = path.resolve().parent
    job = Job.model_validate_json(path.read_bytes())
    training = job.training
    stop = StopSignal()
    if (run / "result" / "manifest.json").is_file():
        return DONE  # starting twice is starting once

    # processes and data; preparing again is opening the cache
    in_parts = training.method == "full" and int(os.environ.get("WORLD_SIZE", "1")) > 1  # an adapter is small: every process holds it whole
    data = prepare(job, run)
    check_labels(data.rows)
    accelerator = Accelerator()
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    if rank == 0:
        events.end_cut_line(run / "events.jsonl")
    log = events.Writer(run / "events.jsonl") if rank == 0 else None
    boards = report.Boards(job, run) if rank == 0 else None

    # model and optimizer
    base, keys = model_folder(job, run, weights=True), TokenKeys()
    budget, checkpointed = micro_batch(job, base, data.rows, device, world)
    if in_parts:
        from trainer.loop import sharded
    model, kernels = load(job, base, device, keys, checkpointed, shard=rank if in_parts else None)
    shards = sharded.Shards(model, device) if in_parts else None
    stop.together, stop.asked = in_parts, stop.asked and not in_parts
    enter = shards.enter if shards else call
    initial = start_values(model, job)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = sharded.Gradients(named.values(), device) if shards else Gradients(named.values())
    optimizer = adamw(named.values(), training, device)
    precise = nullcontext() if training.method == "lora" or job.model.precision == "fp32" else torch.autocast(device.type, torch.bfloat16)

    # the order of rows
    lengths, targets = data.rows.lengths, data.rows.targets()
    order = packing.Order(len(data.rows), training.batch_size, training.num_train_epochs, training.seed, training.max_steps)
    lay, collate = (packing.pack, batch.packed) if training.packing else (packing.pad, batch.padded)

    # continue from the newest whole checkpoint
    state = checkpoint.State(fingerprint=fingerprint(job))
    checkpoints, restore = run / "checkpoints", shards.restore if shards else checkpoint.restore
    found = checkpoint.newest_for_all(checkpoints, rank, device) if world > 1 else checkpoint.newest(checkpoints)
    if found is not None:
        state = restore(found, named, optimizer, state.fingerprint)
    if training.packing:
        probe(model, lambda *pack: enter(pack_reader(model), *pack), data.rows, device, 0.05 if job.model.precision == "int8" else 0.01)
    watchdog = Watchdog(sharded.local(named), model, data.rows, shards.sum) if shards else Watchdog(named, model, data.rows)
    tell_saved = tell_checkpoint(log, run)
    saver = checkpoint.Background(checkpoints, tell_saved)
    if log is not None and boards is not None:
        tell_start(log, run, job, data, state.step, order.total_steps, world, device, named, kernels, boards.warning)

    def make(step: int) -> batch.Work:
        rows = order.step(step)
        packs = lay(packing.share(rows, lengths, world)[rank], lengths, budget)
        micro = [batch.pinned(collate(data.rows, chosen, HOST), device) for chosen in packs]
        return batch.Work(rows, sum(targets[r] for r in rows), sum(lengths[r] for r in rows), micro, collate(data.rows, rows[:1], HOST))

    progress = Progress(state, order.total_steps, watchdog, data.rows.where, device, log, boards)
    last_save, begun_at = time.monotonic(), state.step
    with closing(batch.Ahead(make, state.step, order.total_steps)) as ahead:  # however the loop ends
        while state.step < order.total_steps and not stop.asked:
            step, work = state.step, ahead.take()
            rate = learning_rate(step, order.total_steps, training.learning_rate, training.lr_scheduler_type, training.warmup_ratio)

            # this rank's share, micro-batch by micro-batch
            gradients.zero()
            for n, micro in enumerate(shards.level(work.micro, work.filler) if shards else work.micro):
                if stop.asked and rank == 0:
                    break
                micro = batch.on(device, micro)  # input_ids (1, T) packed, (B, L) padded
                keys.set(training.seed, step, micro["rows"], micro["position_ids"])
                with precise:
                    loss = enter(target_loss, model, micro) / work.targets  # scalar: this micro-batch's part of the step's mean
                loss = loss if n < len(work.micro) else loss * 0
                loss.backward()
                gradients.extra[0] += loss.detach()
            if stop.asked and rank == 0:
                break  # parameters are still those of the last whole step: rank 0 saves them, there is nothing to agree on
            gradients.extra[1] += stop.asked

            # all ranks together: one sum; the step before is on the host by now
            if world > 1 and not add_up(gradients, stop):
                break
            if progress.settle():
                stop.asked = True
                break
            watchdog.before_update(gradients.views)
            norm = gradients.clip(training.max_grad_norm)
            numbers = Reading(torch.cat([gradients.extra, norm[None]]))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            watchdog.after_update(step + 1, rate, [data.rows.where[r] for r in work.rows])
            if world > 1 and watchdog.compares_ranks:
                refuse_drift(watchdog.checksum(), world, device, step + 1)
            state.step = step + 1
            progress.launched(Launched(state.step, rate, work.tokens, work.rows, numbers))

            # save
            now = time.monotonic()
            due = now - last_save >= training.save_every_s and not saver.busy and state.step < order.total_steps
            if job.deadline_unix_s is not None and time.time() > job.deadline_unix_s:
                stop.hear(late=True)
            save = shards.agree(stop, due) if shards else due and rank == 0
            if save or state.step == begun_at + 1:
                stop.asked |= progress.settle()
            if save and shards:
                tell_saved(state.step, *shards.save(checkpoints, named, optimizer, state))
                last_save = time.monotonic()
            elif save:
                last_save = now
                saver.submit(checkpoint.snapshot(named, optimizer), state)
    progress.settle()

    if stop.asked and state.step < order.total_steps:
        if shards:
            tell_saved(state.step, *shards.save(checkpoints, named, optimizer, state))
        elif rank == 0:
            saver.submit(checkpoint.snapshot(named, optimizer), state)
            saver.wait()
        if stop.late:
            raise Stopped(f"the deadline passed after {state.step} of {order.total_steps} steps; the checkpoint is whole", [], "`milktea resume RUN`")
        return TERMINATED
    saver.wait()
    watchdog.check_base(state.step)
    if shards:
        optimizer.state.clear()
        gradients.zero()
        model = shards.whole(job, base, on_device=job.data.held_out is not None) or model
    if log is not None and boards is not None:
        finish(model, job, run, base, data, state, initial, kernels, device, log, boards, began)
    return DONE


class StopSignal:
    """SIGTERM sets `asked`; the loop looks between micro-batches. `late` tells that it was the deadline. Processes that hold parts of one
    model stop together: with `together`, a wish is only `heard`, and Shards.agree asks for all."""

    def __init__(self) -> None:
        self.heard = self.asked = self.late = self.together = False
        signal.signal(signal.SIGTERM, self.hear)

    def hear(self, *_: Any, late: bool = False) -> None:
        self.heard, self.late = True, self.late or late
        if not self.together:
            self.asked = True


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def micro_batch(job: Job, base: Path, rows: Rows, device: torch.device, world: int) -> tuple[int, int]:
    """(tokens of a micro-batch, layers to recompute in backward) that this device's memory holds. Raises Refused when none fits."""
    if device.type != "cuda":
        return CPU_TOKENS, 0
    shape = memory.Shape.from_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30
    longest, method = max(rows.lengths), memory.method_of(job.training.method, job.lora.use_dora, job.lora.lora_dropout)
    solved = memory.solve(
        shape, capacity, job.model.precision, job.lora.r, job.lora.target_modules, method, longest, max(longest, GPU_TOKENS),
        processes=world, trainable_layers=job.training.freeze_trainable_layers,
    )  # fmt: skip
    if solved is None:
        name = torch.cuda.get_device_name(device)
        raise Refused(
            f"{job.model.base} in {job.model.precision} with rows of {longest} tokens does not fit {name} ({capacity:.0f} GiB)",
            hint='lower data.max_length, set model.precision = "nf4", or ask for a larger card in [offer]',
        )
    return solved


def add_up(gradients: Any, stop: StopSignal) -> bool:
    """Sums the step's gradients over the ranks. False when others are gone because all were asked to stop: rank 0 has saved."""
    try:
        gradients.reduce()
    except RuntimeError:
        if stop.asked:
            return False
        raise
    return True


def pack_reader(model: nn.Module) -> Any:
    def read(ids: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        cut = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return hidden_states(model, input_ids=ids, position_ids=positions, **cut)

    return read


def refuse_drift(checksum: float, world: int, device: torch.device, step: int) -> None:
    """Raises Stopped, on every rank, unless all ranks hold the same trained parameters."""
    mine = torch.tensor([checksum], dtype=torch.float64, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(all_of_them, mine)
    sums = [float(t) for t in all_of_them]
    if len(set(sums)) > 1:
        raise Stopped(f"step {step}: the ranks hold different parameters (checksums {sums})", [], "report this, with the log of every rank")


def fingerprint(job: Job) -> str:
    """sha256 of everything in the job that changes the numbers; not its id, its deadline, or how many processes share the work."""
    free = {"run_id": True, "processes": True, "deadline_unix_s": True, "training": {"save_every_s", "report_to"}}
    return hashlib.sha256(json.dumps(job.model_dump(exclude=free), sort_keys=True).encode()).hexdigest()  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}


# -- what is told -----------------------------------------------------------------------------------------------------------------


def tell_start(
    log: events.Writer, run: Path, job: Job, data: Prepared, step: int, total: int, world: int, device: torch.device,
    named: dict[str, nn.Parameter], kernels: dict[str, str], warning: str,
) -> None:  # fmt: skip
    log.write(
        events.Started,
        step=step,
        total_steps=total,
        processes=world,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        trainable_parameters=sum(p.numel() for p in named.values()),
        kernels=kernels,
        versions=versions(),
    )
    if data.rows.notes:
        (run / "data_report.txt").write_text("\n".join(data.rows.notes) + "\n", encoding="utf-8")
        log.write(events.Warned, message=f"{len(data.rows.notes)} rows were changed or left out: {data.rows.notes[0]} ... (data_report.txt has all)")
    if warning:
        log.write(events.Warned, message=warning)


def finish(
    model: nn.Module, job: Job, run: Path, base: Path, data: Prepared, state: checkpoint.State, initial: dict[str, torch.Tensor],
    kernels: dict[str, str], device: torch.device, log: events.Writer, boards: report.Boards, began: float,
) -> None:  # fmt: skip
    """Held-out answers, the verified result, the last event."""
    fits = next(model.parameters()).device.type == device.type
    scored = evaluate.held_out(model, job, run, data, device) if fits else evaluate.Scored()
    if not fits and job.data.held_out:
        log.write(events.Warned, message="the held-out rows were not scored: the whole model does not fit one card")
    for sample in scored.samples:
        log.write(events.Sample, **sample)
    score = (scored.before, scored.after) if scored.rows else None
    if score is not None:
        log.write(events.Score, rows=scored.rows, exact_match_before=score[0], exact_match_after=score[1])
    facts = {
        "steps": state.step,
        "final_loss": state.curve[-1][1],
        "data_sha256": [f.sha256 for f in job.data.files],
        "template": {"name": data.template.name, "sha256": data.template.sha256, "token_hash": data.token_hash},
        "versions": versions(),
        "kernels": kernels,
        "curve": state.curve,
    }
    png = report.curve_png(state.curve, job.run_id)
    pages = {"loss.png": png, "report.html": report.page(job, facts, scored.samples, score, png)}
    digest = artefact.write_result(run, model, job, base, data, facts, pages, initial)
    log.write(events.Finished, steps=state.step, final_loss=state.curve[-1][1], seconds=round(time.time() - began, 1), adapter_sha256=digest)
    log.close()
    boards.close()


@dataclass(frozen=True)
class Ending:
    """How the process ends, and what it says."""

    code: int
    error: Exception | None = None


def ending(path: Path) -> Ending:
    try:
        return Ending(run_job(path))
    except (Refused, ModelError, TemplateError, checkpoint.CheckpointError) as error:
        return Ending(3, error)
    except (Stopped, artefact.ArtefactError) as error:
        return Ending(STOPPED, error)
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        return Ending(
            1, Stopped(f"out of GPU memory: {str(error)[:200]}", [], 'report this; meanwhile lower data.max_length or set model.precision = "nf4"')
        )


def to_end(path: Path) -> int:
    """Trains, tells how it ended in every place where that is looked for, and returns the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    end = ending(path)
    if first and end.error is not None:
        refuse(path.resolve().parent, end.error)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        (path.resolve().parent / os.environ.get(EXIT_VARIABLE, EXIT_FILE)).write_text(json.dumps(end.code))
    if torch.distributed.is_initialized() and end.code == DONE:
        torch.distributed.destroy_process_group()
    again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return DONE if end.code == STOPPED and again else end.code  # all processes stopped for one reason: torchrun must not try again


def main() -> None:
    sys.exit(to_end(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
