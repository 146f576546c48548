"""Checkpoints: a folder per step that is whole or absent, written beside the training, never in its
way.

checkpoints/N/ holds state.safetensors (trained parameters and AdamW's moments, by name), state.json
(step, curve, what job it belongs to) and manifest.json (sha256 and bytes of both), written under a
hidden name and renamed when all is on disk. Full fine-tuning over several processes writes a part
each instead (trainer/loop/sharded.py, shard-*.safetensors); either form continues on any number of
them. There is no generator state to keep: order and dropout are functions of the step and the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.wire.digest import listed, sha256_of
from trainer.wire.job import Job

# safetensors; a name that torch.distributed.checkpoint does not take for its own
STAGE_FILE = "stage.tensors"
# of an optimizer's state for a parameter: AdamW's, Muon's, bitsandbytes'
KEPT = (
    *("step", "exp_avg", "exp_avg_sq", "momentum_buffer"),
    *("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"),
)
KEEP = 2  # the newest whole one, and the one before it while the newest travels home


class CheckpointError(ValueError):
    """A checkpoint that must not be continued from; the text ends with what to do."""


@dataclass
class State:
    """The state of a run beside its parameters and moments. `step` is the number of finished steps;
    `looks` are [step, loss, accuracy] of held-out rows; `stage` is what the stage keeps for itself.
    """

    step: int = 0
    fingerprint: str = ""
    curve: list[list[float]] = field(default_factory=list)
    stage: dict[str, torch.Tensor] = field(default_factory=dict)
    looks: list[list[float]] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The first look of the smallest loss, of those after training began."""
        trained = [look for look in self.looks if look[0] > 0]
        return int(min(trained, key=lambda look: look[1])[0]) if trained else None

    def copy(self) -> State:
        """A copy in host memory."""
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in self.stage.items()}
        curve, looks = [list(p) for p in self.curve], [list(p) for p in self.looks]
        return State(self.step, self.fingerprint, curve, tensors, looks)


def fingerprint_of(job: Job) -> str:
    """sha256 of everything in the job that changes the numbers; not its id, its limits, the names
    of its variables, or how many processes share the work. Settings at their defaults are left out:
    a trainer that knows one setting more goes on from the checkpoints of one that did not."""
    free: dict[str, Any] = dict.fromkeys(("run_id", "processes", "environment", "limits"), True)
    free["training"] = {"save_every_s", "report_to"}
    told = job.model_dump(exclude=free, exclude_defaults=True)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def snapshot(
    named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Copies in host memory of parameters and moments, taken between two steps; safe to write while
    training goes on."""
    tensors = {}
    for name, parameter in named.items():
        tensors[f"parameter/{name}"] = parameter.detach().to("cpu", copy=True).contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = (
                torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
            )
    return tensors


def restore(
    folder: Path,
    named: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
) -> State:
    """Loads a whole checkpoint into parameters and optimizer. Raises CheckpointError when it
    belongs to another job or model."""
    state = read_state(folder, fingerprint)
    tensors = read_tensors(folder, state)
    validate_complete(folder, named, tensors)
    for name, parameter in named.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter/{name}"])
        for key in (key for key in KEPT if f"optimizer/{key}/{name}" in tensors):
            value = tensors[f"optimizer/{key}/{name}"]
            if key == "step" and f"optimizer/state1/{name}" in tensors:
                optimizer.state[parameter][key] = int(value)  # as bitsandbytes counts
            else:
                stays = key == "step" and not fused(optimizer)
                optimizer.state[parameter][key] = value if stays else value.to(parameter.device)
    return state


def read_state(folder: Path, fingerprint: str) -> State:
    tensors = load_file(folder / STAGE_FILE) if (folder / STAGE_FILE).is_file() else {}
    state = State(**json.loads((folder / "state.json").read_text()), stage=tensors)
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"checkpoints/{folder.name} belongs to another job (fingerprint "
            f"{state.fingerprint[:12]}, this job is {fingerprint[:12]}): "
            "use the job.json that it was made with, or remove the checkpoints folder to start anew"
        )
    return state


def read_tensors(folder: Path, state: State) -> dict[str, torch.Tensor]:
    """What `snapshot` made, in host memory; parts of several processes are put together."""
    if (folder / "state.safetensors").is_file():
        return load_file(folder / "state.safetensors")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    held = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, facts in held.items():
        assert isinstance(facts, TensorStorageMetadata)  # nothing else is written
        tensors[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
    with warnings.catch_warnings():
        # one process is what is meant
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    moved = [
        name.removeprefix("optimizer/exp_avg/")
        for name in held
        if name.startswith("optimizer/exp_avg/")
    ]
    return tensors | {f"optimizer/step/{name}": torch.tensor(float(state.step)) for name in moved}


def validate_complete(
    folder: Path, named: dict[str, torch.nn.Parameter], held: Collection[str]
) -> None:
    missing = [n for n in named if f"parameter/{n}" not in held]
    if missing:
        raise CheckpointError(
            f"checkpoints/{folder.name} lacks {missing[0]} and {len(missing) - 1} more: "
            "remove the checkpoints folder"
        )


def fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def write(root: Path, tensors: dict[str, torch.Tensor], state: State) -> tuple[Path, str]:
    """Writes root/STEP and returns it with the sha256 of its manifest. Writing the same step twice
    keeps the first."""
    final, part = root / str(state.step), root / f".{state.step}.part"
    if (final / "manifest.json").is_file():
        return final, sha256_of(final / "manifest.json")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "state.safetensors")
    return final, seal(root, part, state, {"state.safetensors": listed(part / "state.safetensors")})


def seal(root: Path, part: Path, state: State, files: dict[str, dict[str, str | int]]) -> str:
    """Makes `part`, whose tensors are in `files`, the checkpoint root/STEP, and removes old ones.
    Returns the sha256 of its manifest."""
    final = root / str(state.step)
    told: dict[str, Any] = {"step": state.step, "fingerprint": state.fingerprint}
    told |= {"curve": state.curve, "looks": state.looks}
    (part / "state.json").write_text(json.dumps(told))
    files = {**files, "state.json": listed(part / "state.json")}
    if state.stage:
        save_file(state.copy().stage, part / STAGE_FILE)
        files[STAGE_FILE] = listed(part / STAGE_FILE)
    files = dict(sorted(files.items()))
    (part / "manifest.json").write_text(json.dumps({"step": state.step, "files": files}, indent=1))
    for path in [*part.iterdir(), part]:
        _sync(path)
    part.rename(final)
    _sync(root)
    for old in _numbered(root)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return sha256_of(final / "manifest.json")


def newest_for_all(root: Path, rank: int, device: torch.device) -> Path | None:
    """`newest` as rank 0 sees it, on every process; collective. Raises CheckpointError, everywhere,
    where one of them does not see it."""
    found = newest(root) if rank == 0 else None
    name = [found.name if found else None]
    dist.broadcast_object_list(name, 0, device=device)
    folder = root / name[0] if name[0] else None
    absent = torch.tensor(
        int(folder is not None and not (folder / "manifest.json").is_file()), device=device
    )
    dist.all_reduce(absent)
    if int(absent):
        raise CheckpointError(
            f"{int(absent)} of {dist.get_world_size()} processes do not see "
            f"checkpoints/{name[0]}: the machines must share one run folder (NFS, a "
            "ReadWriteMany volume); or copy checkpoints/ to each of them"
        )
    return folder


def newest(root: Path) -> Path | None:
    """The newest checkpoint whose every file is what its manifest says; damaged ones are passed
    over."""
    return next((folder for folder in reversed(_numbered(root)) if whole(folder)), None)


def whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return bool(files) and all(
            sha256_of(folder / name) == facts["sha256"] for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _numbered(root: Path) -> list[Path]:
    return (
        sorted((p for p in root.glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
        if root.is_dir()
        else []
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Background:
    """Writes one checkpoint at a time in a thread. `submit` returns at once; `wait` returns when it
    is on disk and raises what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self,
        root: Path,
        tensors: dict[str, torch.Tensor],
        state: State,
        written: Callable[[int, Path, str], None],
    ) -> None:
        """`written` is called, in the thread, with step, folder and the sha256 of its manifest."""
        self.wait()
        kept = state.copy()
        self._thread = threading.Thread(
            target=self._write, args=(root, tensors, kept, written), name="checkpoint"
        )
        self._thread.start()

    def _write(
        self,
        root: Path,
        tensors: dict[str, torch.Tensor],
        state: State,
        written: Callable[[int, Path, str], None],
    ) -> None:
        try:
            folder, digest = write(root, tensors, state)
            written(state.step, folder, digest)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
