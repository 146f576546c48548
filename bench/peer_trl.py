"""How fast TRL's DPOTrainer is on the rows of bench/stages.py: one line of JSON for each attempt.

    python -m bench.peer_trl llama-7b --recomputed 16 32 --kept 4 --append FILE

The same random-weight shapes, the same tokens of the same 64 pairs in each step, LoRA r 16 on all
linears in fp32 beside a bf16 base, nothing of ours in the model: transformers with PEFT, its sdpa
attention, rows padded to the longest of a micro-batch as TRL does it where flash attention is not
installed. `--recomputed`: pairs of a micro-batch with gradient checkpointing; `--kept`: without.
`padding` is the share of computed tokens that are none of a row. TRL, datasets, dill and
multiprocess must be importable; they are none of our dependencies.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers

from bench.families import build_peer, gemm_tflops
from bench.rows import Setting
from bench.shapes import SHAPES
from bench.stages import ITEMS, write_run
from bench.training import GIB, attempted, tell
from trainer.stages import dpo
from trainer.wire.job import Job

PAIRS = ITEMS["dpo"]


def tokenised(run: Path, steps: int) -> list[dict[str, list[int]]]:
    """The run's pairs in the order of the stage's steps, under the names of TRL's collator."""
    stage = dpo.Stage(Job.model_validate_json((run / "job.json").read_bytes()), run)
    rows, made = stage.data.rows, []
    for item in (item for step in range(steps) for item in stage.order.step(step)):
        pair: dict[str, list[int]] = {}
        for row, side in ((2 * item, "chosen"), (2 * item + 1, "rejected")):
            span = slice(rows.starts[row], rows.starts[row + 1])
            ids = rows.ids[span].tolist()
            first = int(np.flatnonzero(rows.trained[span])[0])
            pair |= {"prompt_ids": ids[:first], f"{side}_ids": ids[first:]}
        made.append(pair)
    return made


def sizes(pairs: Sequence[dict[str, list[int]]]) -> list[int]:
    """Tokens of each row, of both sides."""
    sides = ("chosen_ids", "rejected_ids")
    return [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in sides]


def padded(pairs: Sequence[dict[str, list[int]]], size: int) -> int:
    """Tokens that micro-batches of `size` pairs compute."""
    parts = (sizes(pairs[at : at + size]) for at in range(0, len(pairs), size))
    return sum(len(part) * max(part) for part in parts)


class Times(transformers.TrainerCallback):
    """When each optimizer step ended; the peak of memory is counted from step `warm` on."""

    def __init__(self, warm: int) -> None:
        self.warm, self.ends = warm, [0.0]

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == self.warm:
                torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())


def measure(
    model: str, pairs: int, recomputed: bool, run: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Some steps of TRL with micro-batches of so many pairs; `run` is a new folder."""
    write_run(run, model, "bf16", "dpo", asked)
    trl, data = import_module("trl"), import_module("datasets")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = asked.warm + asked.steps
    rows = tokenised(run, every)
    peer: Any = build_peer(Setting(model, "bf16", r=asked.r), asked.layers, device)[0]
    lora = peer.peft_config["default"]
    times = Times(asked.warm)
    args = trl.DPOConfig(
        output_dir=str(run / "trl"),
        report_to=[],
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=recomputed,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=asked.pairs // pairs,
        max_steps=every,
        max_length=None,
        learning_rate=1e-4,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_first_step=True,  # and no more: to log is to wait for the card
        logging_steps=every,
        disable_tqdm=True,
    )
    # the rows are tokens already: what it would make of texts is not what is measured
    with patch.object(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset):
        trainer = trl.DPOTrainer(
            peer.unload(),  # TRL puts the adapter on: its reference is then the model without
            args=args,
            peft_config=lora,
            train_dataset=data.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(run / "model"),
            callbacks=[times],
        )
    trainer.train()
    seconds = times.ends[-1] - times.ends[asked.warm]
    counted = rows[asked.warm * asked.pairs :]
    tokens, losses = sum(sizes(counted)), [s["loss"] for s in trainer.state.log_history[:2]]
    return {
        "real_tok_s": round(tokens / seconds, 1),
        "step_s": round(seconds / asked.steps, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "padding": round(1 - tokens / padded(counted, pairs), 3),
        "start_differs_nats": round(abs(losses[0] - math.log(2)), 6),
        "loss_mean": round(losses[-1], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=SHAPES)
    parser.add_argument("--recomputed", nargs="*", type=int, default=[])
    parser.add_argument("--kept", nargs="*", type=int, default=[])
    for name, value in (("steps", 4), ("warm", 2), ("r", 16), ("pairs", PAIRS)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--append", type=Path, help="add the lines to this file")
    asked = parser.parse_args()
    # what write_run reads beside
    asked.items, asked.new, asked.share = lambda stage: asked.pairs, 0, False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = round(gemm_tflops(device), 1) if device.type == "cuda" else 0.0
    attempts = [(n, True) for n in asked.recomputed] + [(n, False) for n in asked.kept]
    wrong = 0
    for model, (pairs, recomputed) in ((m, a) for m in asked.models for a in attempts):
        told: dict[str, Any] = {"model": model, "precision": "bf16", "stage": "dpo"}
        told |= {"peer": f"trl {import_module('trl').__version__}", "checkpointing": recomputed}
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder) / "run"
            told |= attempted(partial(measure, model, pairs, recomputed, at, asked))
        wrong += "error" in told
        told |= {"items": asked.pairs, "steps": asked.steps, "micro_batch_pairs": pairs}
        told |= {"card": torch.cuda.get_device_name() if rate else "cpu", "gemm_tflops": rate}
        told |= {"torch": torch.__version__, "transformers": transformers.__version__}
        tell(told | {"r": asked.r, "date": time.strftime("%Y-%m-%d")}, asked.append)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
