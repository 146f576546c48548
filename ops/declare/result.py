"""What a run of a declared job came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ops import api
from ops.api import Outcome, Run, Screen
from ops.declare.chat import Chat


@dataclass(frozen=True)
class Result:
    """The result of one run, read anew from its folder each time: also while it goes on."""

    run: Run

    @classmethod
    def of(cls, name: str) -> Result:
        """Of the run of this id, or whose id alone begins with it; `last`. Raises JournalError."""
        return cls(api.find_run(name))

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def adapter(self) -> Path | None:
        """The verified adapter.zip at home, or None."""
        return self.run.adapter

    @property
    def usd(self) -> float:
        """Dollars by our own meter, all machines."""
        return self.run.cost().spent_usd

    @property
    def held_out(self) -> float | None:
        """Nats per target token of held-out rows, of the parameters that the result is made of."""
        return self.outcome.held_out

    @property
    def outcome(self) -> Outcome:
        """Losses, speed, GPU, hours, dollars and scores."""
        return api.compare([self.run]).outcomes[0]

    def wait(self, screen: Screen | None = None) -> Result:
        """Watch the run to its end. Raises as `milktea.rent_and_train`."""
        api.attach(self.run, screen=screen)
        return self

    def stop(self, wish: Literal["fetch", "keep", "destroy"] = "fetch") -> Result:
        """End it, as `milktea.stop`."""
        api.stop(self.run, wish)
        return self

    def chat(self, *, device: str = "auto", precision: str = "auto") -> Chat:
        """Load the result on this computer, to talk to it. Raises PreflightError where no result
        is at home."""
        found = api.find_result(self.run.id, root=self.run.folder.parent)
        return Chat(found, device=device, precision=precision)
