"""The screen of a program: it hears what a terminal would show."""

from __future__ import annotations

from collections.abc import Sequence

from ops.job.plan import Plan
from ops.market.models import Instance
from ops.market.ranking import Ranking
from ops.run.journal import Line
from trainer.wire.events import Event, Sample, Score


class Quiet:
    """A `Screen` that tells nobody. Subclass it and override what you want to hear; `event` hears
    every word of the trainer."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.score: Score | None = None

    def line(self, line: Line) -> None:
        """A journal line was written."""

    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
        """The plan is made."""

    def booting(self, instance: Instance, waited_s: float) -> None:
        """The machine starts."""

    def connecting(self, message: str) -> None:
        """A way in is tried."""

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Bytes go up (`what` is push) or come home (pull)."""

    def event(self, event: Event, spent_usd: float, max_usd: float, dies_at_unix_s: float) -> None:
        """The trainer said something."""

    def waiting(self, message: str) -> None:
        """Something has to be waited for."""

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        """People can talk to the result at `page`, which holds the token; told again and again."""

    def destroying(self, why: str) -> None:
        """The box is about to be destroyed."""

    def meter(self, spent_usd: float, max_usd: float) -> None:
        """What the run has cost so far, about once a second."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """After Ctrl-C: the key of one of `choices`, "" to go on; here nobody is asked."""
        return None
