"""The training run, top to bottom: job -> data -> model -> loop -> result. Started by trainer.launch, once a process.

    accelerate launch -m trainer.train job.json

A step is `training.batch_size` rows of one global order. Ranks take shares of it with level token counts, pack them, and add their
gradients of summed losses; the sum is divided by the target tokens of the whole step. So the result does not depend on the number
of processes, on micro-batches, or on where a run was resumed (beyond the order of floating-point additions).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer import artefact, batch, checkpoint, evaluate, events, packing
from trainer.dropout import TokenKeys
from trainer.job import Job
from trainer.launch import EXIT_FILE, refuse
from trainer.model import ModelError, load, target_loss
from trainer.optim import Gradients, adamw
from trainer.prepare import Refused, model_folder, prepare
from trainer.schedule import learning_rate

CPU_TOKENS = 2048  # tokens of a micro-batch where there is no GPU memory to fill


def run_job(path: Path) -> int:
    began = float(os.environ.get("MILKTEA_STARTED", time.time()))
    run = path.resolve().parent
    job = Job.model_validate_json(path.read_bytes())
    stop = StopSignal()
    if (run / "result" / "manifest.json").is_file():
        return 0  # finished before: starting twice is once
    data = prepare(job, run)  # a cache hit: trainer.launch has done it

    # processes and device
    accelerator = Accelerator()
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    log = events.Writer(run / "events.jsonl") if rank == 0 else None
    torch.use_deterministic_algorithms(device.type == "cpu")

    # model, optimizer, order
    keys = TokenKeys()
    base = model_folder(job, run)
    model = load(job, base, device, keys)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = Gradients(named.values())
    optimizer = adamw(named.values(), job.training, device)
    training, lengths, targets = job.training, data.rows.lengths, data.rows.targets()
    order = packing.Order(len(data.rows), training.batch_size, training.num_train_epochs, training.seed, training.max_steps)
    lay, collate = (packing.pack, batch.packed) if training.packing else (packing.pad, batch.padded)
    budget = CPU_TOKENS

    # continue from the newest whole checkpoint
    state = checkpoint.State(fingerprint=fingerprint(job))
    if (found := checkpoint.newest(run / "checkpoints")) is not None:
        state = checkpoint.restore(found, named, optimizer, state.fingerprint)

    def written(step: int, folder: Path, digest: str) -> None:
        assert log is not None
        log.write(events.Checkpoint, step=step, path=folder.relative_to(run).as_posix(), manifest_sha256=digest)

    saver = checkpoint.Background(run / "checkpoints", written)
    if log is not None:
        log.write(
            events.Started,
            step=state.step,
            total_steps=order.total_steps,
            processes=world,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            trainable_parameters=sum(p.numel() for p in named.values()),
            versions=versions(),
            seconds_to_first_step=round(time.time() - began, 3),
        )

    # the loop
    last_save = last_event = loop_began = time.monotonic()
    tokens_done, first_step = 0, state.step
    while state.step < order.total_steps:
        step, tick = state.step, time.monotonic()
        rows = order.step(step)
        step_targets = sum(targets[r] for r in rows)
        rate = learning_rate(step, order.total_steps, training.learning_rate, training.lr_scheduler_type, training.warmup_ratio)
        gradients.zero()
        for chosen in lay(packing.share(rows, lengths, world)[rank], lengths, budget):
            if stop.asked:
                break
            micro = collate(data.rows, chosen, device)  # input_ids (1, T) packed or (B, L) padded
            keys.set(training.seed, step, micro["rows"], micro["position_ids"])
            loss = target_loss(model, micro) / step_targets  # scalar: this micro-batch's part of the step's mean
            loss.backward()
            gradients.extra[0] += loss.detach()
        if stop.asked and rank == 0:
            break  # parameters are still those of the last whole step: nothing to agree on, rank 0 saves them
        gradients.extra[1] += stop.asked
        if world > 1:
            torch.distributed.all_reduce(gradients.buffer)  # in place: the only exchange of a step
        norm = gradients.clip(training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_loss, wish, grad_norm = torch.cat([gradients.extra, norm[None]]).tolist()  # the step's one wait for the device
        if wish:
            stop.asked = True
            break
        optimizer.step()
        state.step = step + 1
        state.curve.append([state.step, step_loss])
        tokens_done += sum(lengths[r] for r in rows)

        now = time.monotonic()
        if log is not None and (now - last_event > 0.25 or state.step in (1, order.total_steps)):
            last_event = now
            log.write(
                events.Step,
                step=state.step,
                loss=step_loss,
                learning_rate=rate,
                grad_norm=grad_norm,
                tokens_per_second=round(sum(lengths[r] for r in rows) / (now - tick), 1),
                gpu_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3) if device.type == "cuda" else 0.0,
                eta_s=round((now - loop_began) / (state.step - first_step) * (order.total_steps - state.step), 1),
            )
        if rank == 0 and now - last_save >= training.save_every_s and not saver.busy:
            last_save = now
            saver.submit(checkpoint.snapshot(named, optimizer), state)

    if stop.asked:
        if rank == 0:
            saver.submit(checkpoint.snapshot(named, optimizer), state)
            saver.wait()
        return 143
    saver.wait()
    if rank != 0:
        return 0

    # result
    scored = evaluate.held_out(model, job, run, data, device)
    for sample in scored.samples:
        log.write(events.Sample, **sample)
    if scored.rows:
        log.write(events.Score, rows=scored.rows, exact_match_before=scored.before, exact_match_after=scored.after)
    facts = {
        "steps": state.step,
        "final_loss": state.curve[-1][1],
        "data_sha256": [f.sha256 for f in job.data.files],
        "template": {"name": data.template.name, "sha256": data.template.sha256, "token_hash": data.token_hash},
        "versions": versions(),
        "kernels": {},
        "curve": state.curve,
    }
    digest = artefact.write_result(run, model, job, base, data.template, facts, {})
    log.write(
        events.Finished,
        steps=state.step,
        final_loss=state.curve[-1][1],
        seconds=round(time.time() - began, 1),
        adapter_sha256=digest,
    )
    log.close()
    return 0


class StopSignal:
    """SIGTERM sets `asked`; the loop looks between micro-batches."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def fingerprint(job: Job) -> str:
    """sha256 of everything in the job that changes the numbers; not its id, its deadline, or how many processes share the work."""
    parts = job.model_dump(exclude={"run_id": True, "processes": True, "deadline_unix_s": True, "training": {"save_every_s", "report_to"}})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")}


def main() -> None:
    path = Path(sys.argv[1])
    try:
        code = run_job(path)
    except (Refused, ModelError, checkpoint.CheckpointError) as error:
        code = refuse(path.resolve().parent, error) if int(os.environ.get("RANK", "0")) == 0 else 3
    if int(os.environ.get("RANK", "0")) == 0:
        (path.resolve().parent / EXIT_FILE).write_text(json.dumps(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
