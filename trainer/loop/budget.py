"""How much one process takes at a time: tokens of a micro-batch, layers recomputed in backward."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from trainer import memory
from trainer.data.errors import InvalidJob
from trainer.data.prepare import model_folder
from trainer.kernels.backend import is_old
from trainer.loop.ranks import Ranks
from trainer.memory import CPU_TOKENS
from trainer.wire.job import Job
from trainer.wire.stages import STAGES

GPU_TOKENS = 16384  # at most; the memory oracle says how many fit
# at most for a step of pairs that is larger, so that it leaves no small micro-batch: where this
# share of the card's memory holds it without recomputing, since packs of many sizes leave gaps
STEP_TOKENS, ROOMY = 32768, 0.9
FORCED = "MILKTEA_BASE_IN_PARTS"  # a variable of the environment


def micro_batch(
    job: Job, base: Path, longest: int, ranks: Ranks, step_tokens: int = 0
) -> tuple[int, int]:
    """(tokens of a micro-batch, layers to recompute in backward) that the processes' devices hold,
    where the longest row has `longest` tokens, a learned prompt's places among them. `step_tokens`:
    of the largest step that a process computes, where a micro-batch may hold all of it. Raises
    InvalidJob when none fits, or when the model's config.json does not tell how large it is."""
    device = ranks.device
    if device.type != "cuda":
        return CPU_TOKENS, 0
    capacity = capacity_of(device)
    of_all = (ranks.world, ranks.base_in_parts, is_old(device))
    solved = for_step(step_tokens, job, base, longest, capacity, *of_all)
    if solved is None:
        name = torch.cuda.get_device_name(device)
        raise InvalidJob(
            f"{job.model.base} in {job.model.precision} with rows of {longest} tokens does not fit "
            f"{name} ({capacity:.0f} GiB)",
            hint='lower data.max_length, set model.precision = "nf4", '
            "or ask for a larger card in [offer]",
        )
    return solved


def for_step(
    step_tokens: int,
    job: Job,
    base: Path,
    longest: int,
    capacity_gib: float,
    world: int,
    in_parts: bool = False,
    old: bool = False,
) -> tuple[int, int] | None:
    """`solve`, and on a card with much room a micro-batch for the whole of a step of so many
    tokens."""
    solved = solve(job, base, longest, capacity_gib, world, in_parts, old)
    if solved is None or solved[1] or step_tokens <= solved[0]:
        return solved
    most, room = min(step_tokens, STEP_TOKENS), capacity_gib * ROOMY
    larger = solve(job, base, longest, room, world, in_parts, old, most)
    return solved if larger is None or larger[1] else max(solved, larger)


def capacity_of(device: torch.device) -> float:
    """GiB of a GPU, as torch reports them."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def wants_parts(job: Job, run: Path, longest: int, device: torch.device, world: int) -> bool:
    """Whether processes are to keep the base in parts: the whole of it does not fit this device,
    and parts do, or FORCED is set where they are possible. Raises InvalidJob as `micro_batch`."""
    lora, training = job.lora, job.training
    method = memory.method_of(training.method, lora.use_dora, lora.lora_dropout)
    possible = memory.base_splits(job.stage, method, job.model.precision)
    if not possible or lora.init_lora_weights == "pissa" or len(job.stages) > 1 or world == 1:
        return False
    if os.environ.get(FORCED):
        return True
    if device.type != "cuda":
        return False
    base, room, old = model_folder(job, run), capacity_of(device), is_old(device)
    whole, parts = (solve(job, base, longest, room, world, p, old) for p in (False, True))
    return whole is None and parts is not None


def solve(
    job: Job,
    base: Path,
    longest: int,
    capacity_gib: float,
    world: int,
    in_parts: bool = False,
    old: bool = False,
    most: int = GPU_TOKENS,
) -> tuple[int, int] | None:
    """memory.solve for this job on a card of `capacity_gib`, which is `old` before Ampere, with
    micro-batches of `most` tokens, or one longer row. Raises InvalidJob for a config.json or
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
            max(longest, most),
            processes=world,
            in_parts=in_parts,
            trainable_layers=training.freeze_trainable_layers,
            saved=tuple(lora.modules_to_save or ()),
            learned=memory.Learned.of(training.method, job.prompt_learning),
            **STAGES[job.stage].memory,
            **(memory.BEFORE_AMPERE if old else {}),
        )
    except ValueError as why:
        raise InvalidJob(
            f"how much memory {job.model.base} needs cannot be told: {why}",
            hint="name a base model of a known family, or correct the setting that is named here",
        ) from why
