"""The keys of a job file that say what becomes of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trainer.wire.job import Positive, Strict

PositiveFloat = Annotated[float, Field(gt=0)]


class Evaluate(Strict):
    """Scores on the held-out file, by the box, once the result is at home."""

    rows: Annotated[Positive, Field(description="The first ones of data.held_out")] = 200
    new_tokens: Annotated[Positive, Field(description="Of one answer at most")] = 256
    minutes: Annotated[
        PositiveFloat, Field(description="At most; the plan prices them, and the box is let go")
    ] = 15.0

    def asked(self) -> dict[str, Any]:
        """As a plan has it."""
        return {"rows": self.rows, "new_tokens": self.new_tokens, "seconds": self.minutes * 60}


class Results(Strict):
    folder: Annotated[Path, Field(description="RUN/adapter.zip and its report go there")] = Path(
        "../out"
    )
    merged: Annotated[
        bool,
        Field(
            description="Once the result is at home, its machine merges it into its base, with a "
            "certificate, and the model (2 bytes of each parameter) comes home too"
        ),
    ] = False
    then_chat_minutes: Annotated[
        Annotated[float, Field(ge=1)] | None,
        Field(
            description="Once the result is at home, its machine serves it to talk to for so long, "
            "or until `milktea stop`; left out, the machine is destroyed at once"
        ),
    ] = None

    @property
    def talk_s(self) -> float:
        return (self.then_chat_minutes or 0.0) * 60
