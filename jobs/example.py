"""A job from Python: plan two ranks of adapters, rent for the cheaper one, train it.

    .venv/bin/python jobs/example.py           without VAST_API_KEY the emulator plays vast.ai

Copy this file and change the job; its keys are those of jobs/reference.toml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import milktea

HERE = Path(__file__).parent
RANKS = (8, 16)


def job(rank: int) -> dict[str, Any]:
    """The practice job with adapters of this rank."""
    return {
        "name": f"rank-{rank}",
        "model": {
            "base": str(HERE.parent / "trainer/practice/practice_model"),
            "precision": "fp32",
        },
        "data": {
            "files": [HERE / "practice/train.json"],
            "held_out": HERE / "practice/held_out.json",
            "max_length": 128,
        },
        "lora": {"r": rank, "lora_alpha": 2 * rank},
        "training": {"learning_rate": 5e-3, "batch_size": 32, "num_train_epochs": 1},
        "limits": {"max_usd": 0.50, "max_hours": 0.5, "stall_minutes": 5},
        "image": {"ref": "milktea/practice:3", "trainer": "image", "size_gib": 0.31},
    }


def main() -> int:
    """Print both predictions, train the cheapest; 0, or the exit code of what went wrong."""
    try:
        plans = [milktea.plan(job(rank)) for rank in RANKS]
        for planned in plans:
            best = planned.ranking.accepted[0]
            print(f"{planned.plan.run_id}: {best.cost.usd:.4f} $ on {best.offer.gpu_name}")
        cheapest = min(plans, key=lambda planned: planned.ranking.accepted[0].cost.usd)
        run = milktea.rent_and_train(cheapest)
    except milktea.MilkteaError as error:
        print(f"{error}\n  money: {error.money}\n  next:  {error.hint}", file=sys.stderr)
        return error.exit_code
    score = next(e for e in run.events() if isinstance(e, milktea.Score))
    print(f"exact match {score.exact_match_before:.1%} -> {score.exact_match_after:.1%}")
    print(f"{run.adapter}, {run.cost().spent_usd:.4f} $")
    return 0


if __name__ == "__main__":
    sys.exit(main())
