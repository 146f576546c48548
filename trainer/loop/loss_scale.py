"""Loss scaling: what training in fp16 needs, whose smallest number is 6e-8.

The loss is multiplied by a scale before the backward pass, and the summed gradients are divided by
it. Where a gradient is not finite the step is skipped and the scale halved; after GROW_AFTER good
steps in a row it doubles. These are torch.amp.GradScaler's rules and defaults. The gradients looked
at are those of all processes, so every process finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.loop.guards import SHOWN, Stopped

KEY = "loss_scale"  # of a checkpoint's tensors of the stage
START, GROW_AFTER = 65536.0, 2000
LEAST = 1.0  # a scale below which it is not the scale that overflows
HINT = (
    'set model.precision = "bf16" and take a card of compute capability 8.0 or more in [offer], or '
    'set model.precision = "fp32"'
)


class LossScale:
    """The scale now, good steps since it changed, and steps skipped in the whole run. Of a run that
    is not computed in fp16 it is not `on`, and the scale stays 1."""

    def __init__(self, on: bool) -> None:
        self.on, self.scale = on, START if on else 1.0
        self.good = self.skipped = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass makes scaled gradients."""
        return loss * self.scale if self.on else loss

    def takes(self, step: int, norm: float, seen: Sequence[str] = ()) -> bool:
        """Whether step `step` (from 1), whose gradients have this norm, may be taken; changes the
        scale. `seen` names its rows. Raises Stopped where fp16 does not serve this training at any
        scale."""
        if math.isfinite(norm):
            self.good += 1
            if self.good == GROW_AFTER:
                self.good, self.scale = 0, 2 * self.scale
            return True
        self.good, self.skipped, self.scale = 0, self.skipped + 1, self.scale / 2
        if self.scale < LEAST:
            raise Stopped(
                f"step {step}: gradients overflow fp16 at every loss scale down to {LEAST:g}: this "
                "model's numbers do not fit it",
                list(seen[:SHOWN]),
                HINT,
            )
        return False

    def validate_trained(self, steps: int) -> None:
        """Raises Stopped where none of the run's `steps` was taken."""
        if steps and self.skipped >= steps:
            raise Stopped(
                f"all {steps} steps overflowed fp16 and were skipped: nothing was trained (the "
                f"loss scale is {self.scale:g} by now)",
                [],
                f"train more steps; or {HINT}",
            )

    @property
    def facts(self) -> dict[str, float]:
        """For events and boards."""
        return {"loss_scale": self.scale, "skipped_steps": self.skipped} if self.on else {}

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint; `restore` takes it back."""
        held = [self.scale, float(self.good), float(self.skipped)]
        return {KEY: torch.tensor(held, dtype=torch.float64)} if self.on else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        if self.on and KEY in state:
            scale, good, skipped = state[KEY].tolist()
            self.scale, self.good, self.skipped = scale, int(good), int(skipped)


def skipped_in(state: dict[str, Tensor]) -> dict[str, int]:
    """For the manifest: how many steps were skipped, where the run was computed in fp16. `state` is
    that of its last step."""
    return {"skipped_steps": int(state[KEY][2])} if KEY in state else {}
