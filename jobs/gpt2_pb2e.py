"""GPT-2 that follows instructions under a preamble of its user's own.

    .venv/bin/python jobs/gpt2_pb2e.py alpaca_data.json

The preamble can be anything as long as training and use agree: it is written to a template file,
travels with the adapter, and `milktea chat` asks with it. The settings are those of the original:
the learning rate with which Alpaca ended, 32 rows a step, an A10 for half an hour.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import milktea

PREAMBLE = (
    "Praise B 2 Elon, whose temporal lobe holds more juice than a charging Tesla. "
    "Below is an instruction that describes a task. Write a response to it."
)
TEMPLATE = (
    PREAMBLE
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


def job(rows: Path, folder: Path, **changes: Any) -> milktea.Job:
    """The job on Alpaca's rows; the template is written into `folder`. `changes` as in
    `Job.with_`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pb2e.txt").write_text(TEMPLATE, encoding="utf-8")
    declared = milktea.Job(
        "gpt2-pb2e",
        model="openai-community/gpt2",
        data=milktea.Data(
            files=[rows], template=str(folder / "pb2e.txt"), max_length=512, over_length="drop"
        ),
        training=milktea.Training(method="full", learning_rate=2e-5, batch_size=32),
        gpu=["A10", "RTX 3090", "RTX 4090"],
        volume=milktea.Volume("gpt2-pb2e"),
        timeout="24h",
        max_usd=1.00,
    )
    return declared.with_(**changes) if changes else declared


def main() -> int:
    """Plan, ask, train, talk; 0, or the exit code of what went wrong."""
    try:
        declared = job(Path(sys.argv[1]), milktea.Volume("gpt2-pb2e").folder)
        print(declared.plan())
        if input("Rent it? [y/N] ").strip().lower() != "y":
            return 0
        result = declared.remote()
        print(f"{result.adapter}, {result.usd:.4f} $, held-out loss {result.held_out}")
        with result.chat() as chat:
            print(chat.ask("Name three things that are charged."))
    except milktea.MilkteaError as error:
        print(f"{error}\n  money: {error.money}\n  next:  {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
