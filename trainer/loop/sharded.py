"""Full fine-tuning over several processes: each keeps a part of every parameter, gradient and
moment (torch's FSDP2, `fully_shard`).

A layer's parameters are gathered when it runs, forward and backward, and let go after it; its
gradients are summed over the processes and cut into parts as they are made. Checkpoints are written
in parts too (torch.distributed.checkpoint, in safetensors: no pickle), so all processes need one
run folder. Numbers are those of one process, beyond the order of additions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.loop import checkpoint
from trainer.loop.optim import EXTRA
from trainer.loop.ranks import StopSignal, Together, Written
from trainer.model.load import load_base
from trainer.model.parts import ModelError, decoder_layers
from trainer.wire.digest import listed
from trainer.wire.job import Job

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Entered(nn.Module):
    """The whole model as one call, whatever the function: FSDP gathers what lies outside the layers
    when its root is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Shards(Together):
    """A model in parts over all processes, which need a process group. Processes stop together,
    since each takes part in gathering every layer; all methods are collective. Raises ModelError
    where torch cannot write the checkpoints of parts: 2.7, of the image for older drivers."""

    def __init__(
        self, stop: StopSignal, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        if not hasattr(dcp, "HuggingFaceStorageWriter"):
            raise ModelError(
                f"torch {torch.__version__} cannot train a whole model over several processes: "
                'take an image with torch 2.11 or newer, one GPU, or training.method = "lora"'
            )
        super().__init__(stop, device, rank, world)

    def place(self, model: nn.Module) -> None:
        """Spreads rank 0's weights (the others' may be on the meta device), a layer at a time: no
        card ever holds the whole model."""
        self._model, self._root = model, _Entered(model)
        mesh = init_device_mesh(self.device.type, (self.world,))
        spread: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self._from_first(buffer)
        for unit in (*decoder_layers(model), self._root):
            self._spread(unit, spread)
            fully_shard(unit, mesh=mesh)
            unit.set_gradient_divide_factor(1.0)  # losses are divided by the step's count already
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def _spread(self, unit: nn.Module, spread: dict[int, nn.Parameter]) -> None:
        """`spread` maps ids of parameters to what replaces them, so that tied ones stay tied."""
        for module in unit.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in spread:
                    spread[id(parameter)] = nn.Parameter(
                        self._from_first(parameter), parameter.requires_grad
                    )
                setattr(module, name, spread[id(parameter)])

    def _from_first(self, tensor: Tensor) -> Tensor:
        here = (
            tensor.detach().to(self.device).contiguous()
            if self.rank == 0
            else torch.empty_like(tensor, device=self.device)
        )
        dist.broadcast(here, 0)
        return here

    def enter(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = self._root(function, *args, **kwargs)
        if not torch.is_grad_enabled():
            self._root.reshard()  # type: ignore[operator]  # else the backward pass does
        return result

    def gradients(self, parameters: Iterable[nn.Parameter], extra: int) -> ShardedGradients:
        return ShardedGradients(parameters, self.device, extra)

    def local(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {n: p.detach().to_local() for n, p in named.items()}  # type: ignore[attr-defined]

    def sum_parts(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def compare(self, checksum: Callable[[], float], step: int) -> None:
        """Does nothing: each part exists once."""

    def whole(self, job: Job, base: Path, on_device: bool) -> nn.Module | None:
        """Loaded again on rank 0, with the trained values; on the device where that is wished and
        fits, else in host memory. None on the others."""
        plain = load_base(job, base, self.device) if self.rank == 0 else None
        targets = dict(plain.named_parameters()) if plain is not None else {}
        for name, parameter in self._model.named_parameters():
            full = parameter.full_tensor()  # type: ignore[attr-defined]
            if plain is not None:
                targets[name].data.copy_(full)
        if plain is not None and on_device:
            try:
                plain.to(self.device)
            except torch.OutOfMemoryError:
                plain.to("cpu")
        return plain

    # -- checkpoints -----------------------------------------------------------------------------

    def save(
        self,
        root: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: checkpoint.State,
        written: Written,
    ) -> None:
        """Each process writes its own file; training waits meanwhile."""
        final, part = root / str(state.step), root / f".{state.step}.part"
        there = torch.tensor(int((final / "manifest.json").is_file()), device=self.device)
        dist.broadcast(there, 0)
        digest = ""
        if not int(there):
            digest = self._write(root, part, named, optimizer, state)
        elif self.rank == 0:
            digest = str(listed(final / "manifest.json")["sha256"])
        if self.rank == 0:
            written(state.step, final, digest)

    def _write(
        self,
        root: Path,
        part: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: checkpoint.State,
    ) -> str:
        """Returns the sha256 of the manifest on rank 0, "" on the others."""
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        dcp.save(
            _tensors(named, optimizer),
            storage_writer=dcp.HuggingFaceStorageWriter(str(part), save_distributed=True),
        )
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            everyone,
            {p.name: listed(p) for p in part.glob(f"shard-{self.rank + 1:05d}-*")},
        )
        digest = ""
        if self.rank == 0:
            digest = checkpoint.seal(
                root,
                part,
                state,
                {name: facts for files in everyone for name, facts in files.items()},
            )
        dist.barrier()
        return digest

    def restore(
        self,
        folder: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
    ) -> checkpoint.State:
        """From the parts of any number of processes, or from the whole file of one."""
        state = checkpoint.read_state(folder, fingerprint)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        held = set(reader.read_metadata().state_dict_metadata)
        checkpoint.validate_complete(folder, named, held)
        for name, parameter in named.items():
            if f"optimizer/exp_avg/{name}" in held:
                step = torch.tensor(
                    float(state.step), device=self.device if checkpoint.fused(optimizer) else "cpu"
                )
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
                optimizer.state[parameter] = {"step": step, **moments}
        dcp.load(_tensors(named, optimizer), storage_reader=reader)
        return state


def _tensors(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By checkpoint.snapshot's names; AdamW's own count of steps is State.step."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        tensors |= {
            f"optimizer/{key}/{name}": value
            for key, value in optimizer.state.get(parameter, {}).items()
            if key in MOMENTS
        }
    return tensors


class ShardedGradients:
    """optim.FlatGradients where each process has its part of them, already summed by the backward
    pass."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], device: torch.device, extra: int = EXTRA
    ) -> None:
        self.parameters = list(parameters)
        self.extra = torch.zeros(extra, device=device)

    @property
    def views(self) -> list[Tensor]:
        return [_part(p) for p in self.parameters]

    def zero(self) -> None:
        self.extra.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self) -> None:
        dist.all_reduce(self.extra)

    def divide(self, by: float) -> None:
        torch._foreach_div_(self.views, by)

    def clip(self, max_norm: float) -> Tensor:
        views = self.views
        squares = torch.stack(torch._foreach_norm(views)).square().sum()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(views, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _part(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # nothing that this step computed depends on it
        parameter.grad = torch.zeros_like(parameter)
    return cast(DTensor, parameter.grad).to_local()
