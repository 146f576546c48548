"""How fast the stages beside sft train: one line of JSON for each model, precision and stage.

    python -m bench.stages llama-7b:bf16 qwen3-8b:fp8 --append bench/results/stages.jsonl
    python -m bench.stages llama-7b:nf4 --stages ppo --capacity 22

The real stages and the real loop on a random-weight model with LoRA r 16 on all linears, which is
made once for all stages of a line's model. Rows have the lengths of bench/training.py's protocol:
rm and dpo 64 pairs a step, kto 64 answers, grpo 8 prompts with 8 answers each, ppo 64 prompts,
answers of `--new` tokens (a random model never stops). `real_tok_s` counts the tokens of rows, of
both sides of a pair, over a step; of grpo and ppo, of prompts and answers once, over an iteration:
drawing them, scoring them, and all optimizer steps that learn from them. With `--share` the prompt
of a pair or group is computed once; its tokens count for each of the rows as without. `--capacity`:
of a card of so many GiB, on which micro-batches are planned. A run looks at all gradients and
parameters after some of its first ten updates, and waits for the card then: steps are measured
after these, iterations of grpo and ppo, which such a look hardly lengthens, from the third on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from bench.families import build, configuration, gemm_tflops, start_adapters, write_profile
from bench.real_job import tokenizer
from bench.rows import Setting, lengths
from bench.shapes import SHAPES
from bench.training import GIB, attempted, tell
from trainer.data.batch import Prefetcher
from trainer.kernels.patch import inner_model
from trainer.loop import budget
from trainer.loop.ranks import Ranks, StopSignal
from trainer.loop.replicas import Replicas
from trainer.loop.reporter import Reporter
from trainer.loop.step import Loop
from trainer.stages import dpo, grpo, kto, ppo, rm, sft
from trainer.stages.rollout import JUDGE, Judge
from trainer.wire.job import Job

STAGES: dict[str, Any] = {"rm": rm, "dpo": dpo, "kto": kto, "grpo": grpo, "ppo": ppo}
ITEMS = {"rm": 64, "dpo": 64, "kto": 64, "grpo": 8, "ppo": 64}
WARM = {"rm": 11, "dpo": 11, "kto": 11, "grpo": 2, "ppo": 2}  # steps that are not measured
PROMPT = 0.3  # of a row's tokens


class Words:
    """Rows of words that are a token each."""

    def __init__(self, words: list[str]) -> None:
        self.dice = np.random.default_rng(1)
        self.words = self.dice.choice(words, 300)
        self.sizes = lengths(Setting())
        self.taken = 0

    def some(self, count: int) -> str:
        drawn = self.words[np.minimum(self.dice.geometric(0.02, max(1, count)), 300) - 1]
        return " ".join(drawn)

    def row(self, stage: str) -> dict[str, Any]:
        """In alpaca's form, whose own words are some 40 tokens."""
        size = int(self.sizes[self.taken % len(self.sizes)])
        self.taken += 1
        prompt, answer = int(size * PROMPT) - 40, size - int(size * PROMPT)
        row: dict[str, Any] = {"instruction": self.some(prompt), "input": ""}
        if stage in ("rm", "dpo"):
            return row | {"chosen": self.some(answer), "rejected": self.some(answer)}
        row["output"] = self.some(answer)
        return row | {"kto_tag": self.taken % 2 == 0} if stage == "kto" else row


def write_run(run: Path, model: str, precision: str, stage: str, asked: argparse.Namespace) -> Path:
    """A run folder whose model has a config and a tokenizer, and no weights."""
    shutil.rmtree(run, ignore_errors=True)
    (run / "data").mkdir(parents=True)
    configuration(model, asked.layers).save_pretrained(run / "model")
    words = Words(tokenizer(run / "model", int(SHAPES[model][1]["vocab_size"])))
    steps = asked.warm + asked.steps
    rows = [words.row(stage) for _ in range((steps + 1) * asked.items(stage))]
    text = json.dumps(rows).encode()
    (run / "data/0.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    file = {"path": "data/0.json", "name": "0.json", "sha256": digest, "size_bytes": len(text)}
    training = {"batch_size": asked.items(stage), "learning_rate": 1e-4, "save_every_s": 1e6}
    told: dict[str, Any] = {
        "run_id": "bench-stages",
        "stages": [{"name": stage}],
        "model": {"base": model, "path": "model", "precision": precision},
        "data": {"files": [file], "template": "alpaca", "max_length": 2600},
        "lora": {"r": asked.r, "lora_alpha": 32},
        "training": training,
    }
    long = {"max_completion_length": asked.new, "rewards": [{"kind": "length", "tokens": 64}]}
    letter = {"rewards": [{"kind": "format", "regex": "^w[0-9]*[02468] "}]}
    if stage in ("grpo", "ppo"):
        told[stage] = long | letter
    if stage in ("rm", "dpo", "grpo"):
        told.setdefault(stage, {})["share_prompts"] = asked.share
    (run / "job.json").write_text(json.dumps(told))
    return run


class Clock:
    """Seconds that are spent in methods of an object, by a name each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, owner: Any, method: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any) -> Any:
            began = self.now()
            try:
                return real(*given)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began

        setattr(owner, method, timed)


@torch.no_grad()
def as_new(model: Any, device: torch.device) -> None:
    """The adapter as PEFT starts it, and nothing of another stage's."""
    for name in [n for n in model.peft_config if n != "default"]:
        model.delete_adapter(name)
    for name in ("score", "value_head", "judge_head"):
        if hasattr(model, name):
            delattr(model, name)
    model.set_adapter("default")
    start_adapters(model, device)


def opened(
    model: nn.Module, names: dict[str, str], run: Path, asked: argparse.Namespace
) -> tuple[Any, Ranks, tuple[int, int]]:
    """(the run's stage with the model in the place of the one that it would load, this process,
    tokens of a micro-batch and layers that are recomputed)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = Job.model_validate_json((run / "job.json").read_bytes())

    def planned(job: Job, base: Path, longest: int, ranks: Ranks, step_tokens: int = 0) -> Any:
        if asked.capacity is None:
            return budget.micro_batch(job, base, longest, ranks, asked.most or step_tokens)
        return budget.solve(job, base, longest, asked.capacity, ranks.world) or (longest, 99)

    patch.object(sft, "micro_batch", planned).start()
    stage = STAGES[job.stage].Stage(job, run)
    stage.kept.load = lambda *_: (model, dict(names))
    stage.compare_with_stock = lambda *_: {}  # another test's
    stage._rehearse_saving = lambda: None
    ranks = Replicas(StopSignal(), device)
    stage.load(ranks)
    plan = (stage.budget, stage.recomputed)
    for i, layer in enumerate(inner_model(model).fast_layers):  # type: ignore[arg-type]
        layer.checkpoint = i < plan[1]
    if job.stage == "ppo":  # the fourth role, in a reward model's place
        stage.roles.add(JUDGE, None, trained=False)
        stage.judge = Judge(0.0, 1.0, 10.0, 1.0)
    return stage, ranks, plan


def tokens_of(stage: Any, step: int) -> int:
    """Of the rows of a step, or of an iteration's prompts and answers."""
    made = getattr(stage, "rollout", None)
    if made is not None:
        return int(made.rows.starts[-1])
    size, lengths = stage.rows_per_item, np.diff(stage.data.rows.starts)
    return int(sum(lengths[i * size : (i + 1) * size].sum() for i in stage.order.step(step)))


def measure(
    model: nn.Module, names: dict[str, str], run: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Some steps of the run's stage."""
    stage, ranks, plan = opened(model, names, run, asked)
    updates = getattr(stage, "updates", 1)
    measured = updates * (asked.warm + asked.steps)
    stage.total_steps = measured + (asked.profile is not None)
    reporter, clock = Reporter(stage.job, run, first=True), Clock(ranks.device)
    loop = Loop(stage.job, run, stage, ranks, reporter)
    drifts, starts = [0.0], [0.0]
    if stage.job.stage in ("grpo", "ppo"):
        stage.validate_drift = lambda _, drift: drifts.append(drift)
        clock.watch(stage, "_drawn", "rollout")
        clock.watch(stage, "complete", "score")
    if stage.job.stage in ("dpo", "kto"):
        stage.validate_start = lambda step, apart: starts.append(apart if step == 1 else 0.0)
    ahead, tokens, began = Prefetcher(stage.batches, 0, stage.total_steps), 0, 0.0
    try:
        for step in range(measured):
            if step == updates * asked.warm:
                clock.seconds.clear()
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                tokens, began = 0, clock.now()
            loop._step(ahead.take())
            if step % updates == 0:
                tokens += tokens_of(stage, step)
        seconds = clock.now() - began
        if asked.profile:
            write_profile(lambda: loop._step(ahead.take()), asked.profile)
        loop.progress.settle()
    finally:
        ahead.close()
        reporter.close()
    split = {f"{k}_s": round(v / asked.steps, 3) for k, v in clock.seconds.items()}
    if split:
        split["train_s"] = round(seconds / asked.steps - sum(split.values()), 3)
    return {
        "real_tok_s": round(tokens / seconds, 1),
        "step_s": round(seconds / asked.steps, 3),
        **split,
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "items": stage.job.training.batch_size,
        "steps": asked.steps,
        "warm": asked.warm,
        "micro_batch": plan[0],
        "checkpoint_layers": plan[1],
        "prompts": stage.kernels.get("prompts", ""),
        "drift_nats": round(max(drifts), 5),
        "start_differs_nats": max(starts),
        "loss_last": round(loop.state.curve[-1][1], 4),
    }


def measure_anew(
    model: nn.Module,
    names: dict[str, str],
    device: torch.device,
    run: Callable[[], Path],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    """`measure` in a run that is made now, with adapters as they begin."""
    as_new(model, device)
    return measure(model, names, run(), asked)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME:PRECISION, NAME of " + ", ".join(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    for name, value in (("steps", 4), ("r", 16), ("new", 256)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--warm", type=int, help="steps before those that are measured")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--few", type=int, help="items of a step, in place of the protocol's")
    parser.add_argument("--capacity", type=float, help="GiB of the card that is planned for")
    parser.add_argument("--most", type=int, help="of a step's tokens, in one micro-batch")
    parser.add_argument("--share", action="store_true", help="a group's prompt is computed once")
    parser.add_argument("--profile", type=Path, help="write one step more's kernels to this file")
    parser.add_argument("--append", type=Path, help="add the lines to this file")
    asked = parser.parse_args()
    warm = asked.warm
    asked.items = lambda stage: asked.few or ITEMS[stage]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = round(gemm_tflops(device), 1) if device.type == "cuda" else 0.0
    wrong = 0
    for name in asked.models:
        shape, precision = name.split(":")
        model, names = build(Setting(shape, precision, r=asked.r), asked.layers, device)
        for stage in asked.stages:
            asked.warm = WARM[stage] if warm is None else warm
            with tempfile.TemporaryDirectory() as folder:
                told: dict[str, Any] = {"model": shape, "precision": precision, "stage": stage}
                run = partial(write_run, Path(folder) / "run", shape, precision, stage, asked)
                told |= attempted(partial(measure_anew, model, names, device, run, asked))
            wrong += "error" in told
            told |= {"capacity_gib": asked.capacity, "new": asked.new, "r": asked.r}
            told |= {"card": torch.cuda.get_device_name() if rate else "cpu", "gemm_tflops": rate}
            told |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            tell(told, asked.append)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
