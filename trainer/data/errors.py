"""What ends a job before it starts."""

from __future__ import annotations

from collections.abc import Sequence


class InvalidJob(ValueError):
    """The job cannot start: exit code 3. `samples` are file:line; `hint` is what to do."""

    def __init__(self, reason: str, samples: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.samples, self.hint = list(samples), hint


class ModelMissing(InvalidJob):
    """The base model is not on this machine, and the hub does not give it."""
