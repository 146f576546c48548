"""Learning rates: transformers' own numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainer.loop.optim import optimizer_of, set_rates
from trainer.loop.schedule import learning_rate
from trainer.wire.job import Training


def settings(**more: Any) -> Training:
    return Training(learning_rate=0.01, **more)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    ("total", "ratio"), [(1, 0.0), (2, 0.9), (10, 0.0), (10, 0.03), (37, 0.25)]
)
def test_rates_are_those_of_transformers(kind: str, total: int, ratio: float) -> None:
    name = "constant_with_warmup" if kind == "constant" else kind
    warmup = math.ceil(ratio * total)
    told = settings(lr_scheduler_type=kind, warmup_ratio=ratio)
    assert_as_transformers(told, total, name, warmup)


def assert_as_transformers(
    told: Training, total: int, name: str, warmup: int, since: int = 0, **more: Any
) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=more)
    for step in range(total):
        if step >= since:
            want = pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
            assert learning_rate(step, total, told) == want
        optimizer.step()
        theirs.step()


def test_a_cosine_with_a_floor_and_warm_up_in_steps_is_transformers_own() -> None:
    told = settings(warmup_steps=5, min_lr_rate=0.1)
    assert_as_transformers(told, 40, "cosine_with_min_lr", 5, min_lr_rate=0.1)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_warm_up_stable_decay_is_transformers_own(floor: float) -> None:
    told = settings(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=4, decay_ratio=0.3, min_lr_rate=floor
    )
    more = {"num_decay_steps": 12, "min_lr_ratio": floor}
    since = 4 if floor else 0  # theirs warms up from the floor, ours from zero as with the others
    assert_as_transformers(told, 40, "warmup_stable_decay", 4, since, **more)


def test_a_run_of_one_step_learns_something() -> None:
    assert learning_rate(0, 1, settings()) == 0.01


def test_a_floor_under_a_rate_that_never_falls_is_refused() -> None:
    with pytest.raises(ValidationError, match="never falls"):
        Training(lr_scheduler_type="constant", min_lr_rate=0.1)


def test_matrices_decay_vectors_do_not_and_groups_keep_their_rates() -> None:
    matrix, vector, other = (
        torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3, 2))
    )
    told = settings(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = optimizer_of([[matrix, vector], [other]], told, torch.device("cpu"))
    set_rates(optimizer, [0.5, 0.25])
    for p in (matrix, vector, other):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.5 * 0.1))
    assert torch.equal(vector, torch.ones(2))
    assert torch.allclose(other, torch.full((3, 2), 1 - 0.25 * 0.1))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    assert optimizer.param_groups[0]["eps"] == 1e-6
