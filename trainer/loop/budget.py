"""How much one process takes at a time: tokens of a micro-batch, layers recomputed in backward."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from trainer import memory
from trainer.data.errors import InvalidJob
from trainer.wire.job import Job
from trainer.wire.stages import STAGES

CPU_TOKENS = 2048  # of a micro-batch where there is no GPU memory to fill
GPU_TOKENS = 16384  # at most; the memory oracle says how many fit


def micro_batch(
    job: Job, base: Path, longest: int, device: torch.device, world: int
) -> tuple[int, int]:
    """(tokens of a micro-batch, layers to recompute in backward) that `device` holds, where the
    longest row has `longest` tokens, a learned prompt's places among them, and `world` processes
    share the work. Raises InvalidJob when none fits, or when the model's config.json does not tell
    how large it is."""
    if device.type != "cuda":
        return CPU_TOKENS, 0
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30
    solved = solve(job, base, longest, capacity, world)
    if solved is None:
        name = torch.cuda.get_device_name(device)
        raise InvalidJob(
            f"{job.model.base} in {job.model.precision} with rows of {longest} tokens does not fit "
            f"{name} ({capacity:.0f} GiB)",
            hint='lower data.max_length, set model.precision = "nf4", '
            "or ask for a larger card in [offer]",
        )
    return solved


def solve(
    job: Job, base: Path, longest: int, capacity_gib: float, world: int
) -> tuple[int, int] | None:
    """memory.solve for this job on a card of `capacity_gib`. Raises InvalidJob for a config.json or
    target_modules that it cannot reckon with."""
    lora, training = job.lora, job.training
    try:
        shape = memory.Shape.from_config(
            json.loads((base / "config.json").read_text(encoding="utf-8"))
        )
        return memory.solve(
            shape,
            capacity_gib,
            job.model.precision,
            lora.largest_rank,
            lora.counted_modules,
            memory.method_of(training.method, lora.use_dora, lora.lora_dropout),
            longest,
            max(longest, GPU_TOKENS),
            processes=world,
            trainable_layers=training.freeze_trainable_layers,
            saved=tuple(lora.modules_to_save or ()),
            learned=memory.Learned.of(training.method, job.prompt_learning),
            **STAGES[job.stage].memory,
        )
    except ValueError as why:
        raise InvalidJob(
            f"how much memory {job.model.base} needs cannot be told: {why}",
            hint="name a base model of a known family, or correct the setting that is named here",
        ) from why
