"""Pure: what a run computes and transfers, and how fast a machine on offer computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from ops.hardware import gpus
from ops.market.models import Offer
from trainer import memory
from trainer.wire.stages import DECODED, STAGES, StageName

_START_S = 40.0  # from the launch to step 1: imports, self-tests, compilation
# share of the driver's memory that torch reports: 23.6 of an RTX 4090's 23.99 GiB
_TORCH_SHARE = 0.98
# a practice run trains on this computer's CPU: two cores measured 40 to 70 GFLOP/s
_PRACTICE_FLOPS = 50e9
Modules = tuple[str, ...] | Literal["all-linear"]  # hashable, unlike memory.Targets


@dataclass(frozen=True)
class Workload:
    """What a run transfers and computes, on any machine.

    `tokens` counts all epochs, and of a stage that asks the model its answers at their longest;
    `work` is what one costs, sft's being 1. `model_parameters` counts all parameters;
    `active_parameters` those of a mixture of experts that one token uses, None where it uses all.
    With `shape`, whether and how the model fits a GPU is solved as the trainer does it: `method`
    and `trainable_layers` as memory.predict takes them, `least_tokens` the tokens of the longest
    row, `row_tokens` the row length that a token sees on average (sum of squared lengths over sum
    of lengths). `saved` are the modules that are trained fully beside an adapter, `learned` is a
    learned prompt. `home_*_mbps` is the laptop's own connection. `boot_s` is from create to a
    shell, without the image.
    `cpu_practice`: a run against the emulator, on this computer's CPU. `before` are the stages that
    the same machine trains before this one, of which what they compute counts. `merges` adapters
    are merged into the base before it trains. `talk_s` is how long the box serves a result at the
    end, `evaluate_s` how long it scores it at most, `merged_bytes` the size of the merged
    model that comes home; 0 where none is asked for. `install_bytes` are the wheels that the box
    fetches and installs before it trains; 0 where the image has them.
    `answers` of `answer_tokens` are drawn to each prompt; `shared` of the tokens are prompts' that
    a micro-batch that holds all answers to one computes for the first alone, once they are drawn.
    `in_parts`: the GPUs keep a part of the frozen base each, as memory.predict has it.
    """

    tokens: float
    model_parameters: float
    stage: StageName = "sft"
    precision: str = "bf16"
    num_gpus: int = 1
    image_bytes: float = 4e9
    model_download_bytes: float = 0.0
    push_bytes: float = 0.0
    pull_bytes: float = 0.0
    disk_gib: float = 40.0
    cpu_practice: bool = False
    shape: memory.Shape | None = None
    method: str = "lora"
    trainable_layers: int = 2
    r: int = 16
    target_modules: memory.Targets = "all-linear"
    least_tokens: int = 2048
    row_tokens: float = 340.0
    checkpoint_bytes: float = 0.0
    save_every_s: float = 120.0
    home_up_mbps: float = 50.0
    home_down_mbps: float = 100.0
    boot_s: float = 60.0
    start_s: float = _START_S
    active_parameters: float | None = None
    saved: tuple[str, ...] = ()
    learned: memory.Learned | None = None
    before: tuple[Workload, ...] = ()
    talk_s: float = 0.0
    evaluate_s: float = 0.0
    merged_bytes: float = 0.0
    merges: int = 0
    install_bytes: float = 0.0
    work: float = 1.0
    answers: int = 1
    answer_tokens: int = 0
    shared: float = 0.0
    in_parts: bool = False

    def __post_init__(self) -> None:
        loads = [Workload(**w) if isinstance(w, dict) else w for w in self.before]
        object.__setattr__(self, "before", tuple(loads))
        if isinstance(self.shape, dict):  # read back from a journal's line
            object.__setattr__(self, "shape", memory.Shape(**self.shape))
        if isinstance(self.learned, dict):
            object.__setattr__(self, "learned", memory.Learned(**self.learned))
        object.__setattr__(self, "saved", tuple(self.saved))

    @property
    def each(self) -> tuple[Workload, ...]:
        """Every stage, in order."""
        return (
            *(replace(one, num_gpus=self.num_gpus) for one in self.before),
            replace(self, before=()),
        )

    @property
    def counted(self) -> str:
        """The tokens, in words."""
        answers = ", answers at their longest," if STAGES[self.stage].rows == "prompts" else ""
        return f"{self.tokens / 1e6:.2f} M tokens{answers}"

    def work_in(self, micro_batch: int) -> float:
        """What a token costs, sft's being 1, where a micro-batch holds so many tokens: answers that
        do not fit one with their prompt compute it again."""
        if not self.shared:
            return self.work
        prompt = self.least_tokens - self.answer_tokens
        together = max(1, (micro_batch - prompt) // self.answer_tokens)
        times = math.ceil(self.answers / together)
        saved = self.shared * (self.answers - times) / (self.answers - 1)
        return self.work - (self.work - DECODED) * saved / self.tokens

    @property
    def fetched_bytes(self) -> float:
        """What the box fetches by itself once it runs: wheels, and a base model of the hub."""
        return self.install_bytes + self.model_download_bytes

    @property
    def computed_parameters(self) -> float:
        """The parameters that one token uses."""
        return self.active_parameters or self.model_parameters


class DoesNotFit(ValueError):
    """This GPU cannot run the workload. The message says why, `filter_name` what to change in the
    job file."""

    def __init__(self, why: str, filter_name: str) -> None:
        super().__init__(why)
        self.filter_name = filter_name


def tokens_per_second(offer: Offer, workload: Workload) -> float:
    """The predicted training speed of an offer. Raises DoesNotFit when the GPU is too small, does
    not support the precision, or is neither in our table nor in vast.ai's benchmark."""
    if workload.cpu_practice:
        flops = 4 * workload.computed_parameters * workload.work_in(memory.CPU_TOKENS)
        return _PRACTICE_FLOPS / flops
    gpu = gpus.find(offer.gpu_name, offer.gpu_memory_gib) or gpus.from_benchmark(
        offer.gpu_name,
        offer.gpu_memory_gib,
        offer.compute_capability,
        offer.dlperf / offer.num_gpus,
        offer.gpu_memory_gb_s,
    )
    if gpu is None:
        raise DoesNotFit(
            f"the speed of a {offer.gpu_name} is unknown, and the offer carries no DLPerf",
            "gpu_name",
        )
    micro_batch, recomputed = _fitting(offer, workload)
    full, shape = workload.method == "full", workload.shape
    old = offer.compute_capability < gpus.AMPERE
    fused = (
        shape is not None
        and not old
        and memory.takes_fused_layer(shape, workload.precision, workload.r, workload.method)
    )
    speed = gpus.tokens_per_second(
        gpu,
        workload.precision,
        workload.computed_parameters,
        workload.shape,
        recomputed,
        workload.num_gpus,
        full,
        workload.row_tokens,
        fused,
    )
    if speed <= 0:
        why = (
            f"a {offer.gpu_name} (compute capability {offer.compute_capability}) does not "
            f"compute in {workload.precision}"
        )
        raise DoesNotFit(why, "model.precision")
    return speed / workload.work_in(micro_batch)


def _fitting(offer: Offer, workload: Workload) -> tuple[int, float]:
    """_fit of an offer. Raises DoesNotFit."""
    w = workload
    if w.shape is None:
        return w.least_tokens, 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = (
        "all-linear" if w.target_modules == "all-linear" else tuple(w.target_modules)
    )
    longest_row = max(1, min(w.least_tokens, int(w.tokens)))
    found = _fit(
        w.shape,
        offer.gpu_memory_gib,
        w.precision,
        w.r,
        targets,
        w.method,
        w.trainable_layers,
        longest_row,
        w.num_gpus,
        w.stage,
        w.saved,
        w.learned,
        offer.compute_capability < gpus.AMPERE,
        w.in_parts,
    )
    if isinstance(found, str):
        raise DoesNotFit(
            f"{found} in {w.precision}, a {offer.gpu_name} has {offer.gpu_memory_gib:.1f} GiB",
            "gpu_memory",
        )
    return found


@lru_cache(maxsize=4096)
def _fit(
    shape: memory.Shape,
    driver_gib: float,
    precision: str,
    r: int,
    targets: Modules,
    method: str,
    trainable_layers: int,
    longest_row: int,
    processes: int,
    stage: StageName,
    saved: tuple[str, ...],
    learned: memory.Learned | None,
    old: bool,
    in_parts: bool,
) -> tuple[int, float] | str:
    """The tokens of a micro-batch and the share of layers (0 to 1) whose activations are recomputed
    on a GPU of that memory, or a text that says what memory it would need. Cached: a market has few
    sizes."""
    capacity = driver_gib * _TORCH_SHARE
    more: Any = {
        "processes": processes,
        "trainable_layers": trainable_layers,
        "saved": saved,
        "learned": learned,
        "in_parts": in_parts,
        **STAGES[stage].memory,
        **(memory.BEFORE_AMPERE if old else {}),
    }
    plan = memory.solve(shape, capacity, precision, r, targets, method, longest_row, **more)
    if plan is None:
        need = memory.min_gpu_memory_gib(shape, precision, r, targets, method, longest_row, **more)
        return f"needs {math.ceil(need / _TORCH_SHARE * 10) / 10:.1f} GiB"
    return plan[0], plan[1] / shape.layers
