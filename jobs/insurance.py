"""An insurance helper, declared in Python: a few thousand questions in Chinese with their answers.

    .venv/bin/python jobs/insurance.py rows.json held_out.json

Copy this file and change the job. It shows the plan, asks, trains on a rented GPU, and answers one
question. The same settings as a job file, with where they come from: jobs/recipes/insurance.toml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import milktea


def job(rows: Path, held_out: Path, **changes: Any) -> milktea.Job:
    """The job on these rows; `changes` as in `Job.with_`."""
    declared = milktea.Job(
        "insurance",
        model=milktea.Model(base="Qwen/Qwen2.5-7B@main", precision="nf4"),
        data=milktea.Data(files=[rows], held_out=held_out, max_length=1024, over_length="drop"),
        lora=milktea.Lora(r=16, lora_alpha=32),
        training=milktea.Training(num_train_epochs=2, batch_size=16, learning_rate=1e-4),
        gpu=["RTX 4090", "RTX 3090", "RTX A5000"],  # the cheapest finished run wins
        volume=milktea.Volume("insurance"),  # results of all its runs come home here
        timeout="4h",
        max_usd=2.00,
    )
    return declared.with_(**changes) if changes else declared


def main() -> int:
    """Plan, ask, train, talk; 0, or the exit code of what went wrong."""
    try:
        declared = job(*map(Path, sys.argv[1:3]))
        print(declared.plan())
        if input("Rent it? [y/N] ").strip().lower() != "y":
            return 0
        result = declared.remote()
        print(f"{result.adapter}, {result.usd:.4f} $, held-out loss {result.held_out}")
        with result.chat() as chat:
            for piece in chat.stream("什么是免赔额？"):
                print(piece, end="", flush=True)
        print()
    except milktea.MilkteaError as error:
        print(f"{error}\n  money: {error.money}\n  next:  {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
