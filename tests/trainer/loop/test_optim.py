"""What moves the parameters: torch's and bitsandbytes' numbers, and no number lost on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import manifest_of

from trainer.loop import checkpoint
from trainer.loop.optim import optimizer_of, set_rates
from trainer.train import run_job
from trainer.wire.job import Job, Training

Make = Callable[..., Path]
HOST, STEPS = torch.device("cpu"), 6


def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(5)
    shapes = {
        "table": (9, 8),
        "tall": (80, 64),
        "wide": (64, 96),
        "vector": (8,),
        "deep": (2, 4, 3),
    }
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def moved(
    named: dict[str, torch.nn.Parameter],
    step: Callable[[], Any],
    first: int = 0,
    steps: int = STEPS,
) -> None:
    for number in range(first, steps):
        torch.manual_seed(number)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape)
        step()


def settings(optim: str) -> Training:
    method = {"muon": "full"}.get(optim, "lora")
    told = {"optim": optim, "method": method, "weight_decay": 0.1, "learning_rate": 0.01}
    return Training.model_validate(told)


def test_muon_is_torchs_own_and_leaves_tables_and_vectors_to_adamw() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon since 2.9")
    ours, theirs = parameters(), parameters()
    made = optimizer_of([list(ours.values())], settings("muon"), HOST, [ours["table"]])
    set_rates(made, [0.02])
    moved(ours, made.step)
    matrices = [theirs["tall"], theirs["wide"]]
    muon = torch.optim.Muon(matrices, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs["table"], theirs["deep"]]
    beside = [
        torch.optim.AdamW(rest, 0.02, weight_decay=0.1),
        torch.optim.AdamW([theirs["vector"]], 0.02, weight_decay=0.0),
    ]
    moved(theirs, lambda: [optimizer.step() for optimizer in (muon, *beside)])
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_adamw_in_8_bits_stays_close_to_torchs_adamw_with_a_quarter_of_the_moments() -> None:
    ours, theirs = parameters(), parameters()
    begin = {name: p.detach().clone() for name, p in ours.items()}
    made = optimizer_of([list(ours.values())], settings("adamw_8bit"), HOST)
    moved(ours, made.step)
    moved(theirs, optimizer_of([list(theirs.values())], settings("adamw"), HOST).step)
    assert made.state[ours["tall"]]["state1"].dtype == torch.uint8
    for name in ours:
        way = (theirs[name] - begin[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.1 * way, name


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon"])
def test_an_optimizer_goes_on_from_a_checkpoint_to_the_same_bits(
    optim: str, tmp_path: Path
) -> None:
    def made() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        named = parameters()
        return named, optimizer_of([list(named.values())], settings(optim), HOST, [named["table"]])

    straight, optimizer = made()
    moved(straight, optimizer.step)
    begun, optimizer = made()
    moved(begun, optimizer.step, steps=3)
    state = checkpoint.State(step=3, fingerprint="f")
    folder, _ = checkpoint.write(tmp_path, checkpoint.snapshot(begun, optimizer), state)
    again, optimizer = made()
    checkpoint.restore(folder, again, optimizer, "f")
    moved(again, optimizer.step, first=3)
    for name in straight:
        assert torch.equal(again[name], straight[name]), name


def test_what_an_optimizer_cannot_move_is_refused_by_name(run_folder: Make) -> None:
    told = Job.model_validate_json(run_folder().read_bytes()).model_dump()
    for optim, method, processes in (
        ("muon", "lora", 1),
        ("muon", "full", 2),
        ("adamw_8bit", "full", 2),
    ):
        changed = {"training": {"optim": optim, "method": method}, "processes": processes}
        with pytest.raises(ValidationError, match=r"training\.optim"):
            Job.model_validate(told | changed)


@pytest.mark.parametrize(
    ("optim", "method"), [("muon", "freeze"), pytest.param("adamw_8bit", "lora")]
)
def test_a_run_learns_by_it(run_folder: Make, optim: str, method: str) -> None:
    told = {"optim": optim, "method": method, "max_steps": 6, "learning_rate": 1e-2}
    job = run_folder(training=told)
    assert run_job(job) == 0
    losses = [loss for _, loss in manifest_of(job)["curve"]]
    assert losses[-1] < losses[0] - 0.1
