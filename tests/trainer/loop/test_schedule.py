"""Learning rates: transformers' own numbers."""

from __future__ import annotations

import pytest
import torch

from trainer.loop.schedule import learning_rate


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    ("total", "ratio"), [(1, 0.0), (2, 0.9), (10, 0.0), (10, 0.03), (37, 0.25)]
)
def test_rates_are_those_of_transformers(kind: str, total: int, ratio: float) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    warmup = -int(-ratio * total // 1)
    theirs = get_scheduler(
        "constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, total
    )
    for step in range(total):
        assert learning_rate(step, total, 0.01, kind, ratio) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-12, abs=1e-15
        )
        optimizer.step()
        theirs.step()


def test_a_run_of_one_step_learns_something() -> None:
    assert learning_rate(0, 1, 0.01, "cosine", 0.03) == 0.01
