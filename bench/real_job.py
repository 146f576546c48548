"""A real job on this machine's GPUs, as a box runs it: `milktea-train` on a 7B read from disk and
20,000 rows from a JSON file.

    python -m bench.real_job --precision fp8 --append bench/results/real-job.jsonl
    python -m bench.real_job --precision fp8 --cold           (Triton's cache emptied before)
    python -m bench.real_job --gpus 2

The base has random weights of Llama-7B's shape, the rows the lengths of bench/training.py's
protocol. Prints one line of JSON: seconds from the launch to `started` and to the first step, the
median speed after the tenth step, loss and gradient norm at both ends. The model stays in --folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import Setting, lengths
from bench.training import SHAPES, tell

TEMPLATES = Path(__file__).parent.parent / "trainer/data/templates"
SHARD_LAYERS = 8


def tokenizer(folder: Path, vocabulary: int) -> list[str]:
    """A word-level tokenizer of that many ids, in `folder`; returns the words that rows may use."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    used = sorted(
        {w for p in TEMPLATES.iterdir() for w in re.findall(r"\w+|[^\w\s]+", p.read_text("utf-8"))}
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = [f"w{n}" for n in range(vocabulary - len(used) - len(special))]
    made = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate([*special, *used, *words])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return words


def base_model(folder: Path, name: str) -> None:
    """Random bf16 weights in shards of eight layers, written as they are made; `folder` is there
    when it is whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    config = LlamaConfig(
        **vars(shape), max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(draft)
    tokenizer(draft, shape.vocab_size)
    with torch.device("meta"):
        plan = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[int, list[str]] = {}
    for n in plan:
        layer = re.search(r"layers\.(\d+)\.", n)
        shards.setdefault(int(layer[1]) // SHARD_LAYERS if layer else -1, []).append(n)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where: dict[str, str] = {}
    for number, names in shards.items():
        file = f"model-{number + 2}.safetensors"
        tensors = {
            n: torch.ones(plan[n], dtype=torch.bfloat16)
            if len(plan[n]) == 1
            else (torch.randn(plan[n], device=device) * 0.02).bfloat16().cpu()
            for n in names
        }
        save_file(tensors, draft / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    draft.rename(folder)


def rows(words: list[str]) -> list[dict[str, str]]:
    """Alpaca rows whose lengths in tokens are the protocol's, up to the template's own words."""
    generator = np.random.default_rng(1)
    few = generator.choice(words, 300)
    made = []
    for count in lengths(Setting()):
        drawn = few[np.minimum(generator.geometric(0.02, max(count - 40, 8)), 300) - 1]
        cut = max(1, int(len(drawn) * 0.2))
        made.append(
            {"instruction": " ".join(drawn[:cut]), "input": "", "output": " ".join(drawn[cut:])}
        )
    return made


def job(
    run: Path, model: Path, precision: str, method: str, gpus: int, steps: int, batch: int
) -> None:
    shutil.rmtree(run, ignore_errors=True)
    (run / "data").mkdir(parents=True)
    (run / "model").symlink_to(model)
    words = [
        w
        for w in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        if re.fullmatch(r"w\d+", w)
    ]
    text = json.dumps(rows(words)).encode()
    (run / "data/0.json").write_bytes(text)
    file = {
        "path": "data/0.json",
        "name": "rows.json",
        "sha256": hashlib.sha256(text).hexdigest(),
        "size_bytes": len(text),
    }
    job_json: dict[str, Any] = {
        "run_id": "real-job",
        "processes": gpus,
        "model": {"base": model.name, "path": "model", "precision": precision},
        "data": {"files": [file], "template": "alpaca", "max_length": 2048},
        "lora": {"r": 16, "lora_alpha": 32},
        "training": {
            "method": method,
            "batch_size": batch,
            "max_steps": steps,
            "learning_rate": 1e-3 if method == "lora" else 1e-4,
            "save_every_s": 1000,
        },
    }
    (run / "job.json").write_text(json.dumps(job_json))


def train(run: Path) -> tuple[float, float]:
    """(unix time of the launch, seconds to the end). Raises CalledProcessError."""
    command = [sys.executable, "-m", "trainer.launch", "job.json"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(TEMPLATES.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    }
    with open(run / "log.txt", "wb") as log:
        began = time.time()
        code = subprocess.run(command, cwd=run, env=environment, stdout=log, stderr=log).returncode
    if code:
        print((run / "log.txt").read_text()[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(code, command)
    return began, time.time() - began


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/real-job"), help="models and the run; 14 GB"
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-7b")
    parser.add_argument("--precision", choices=["bf16", "fp8", "nf4"], default="fp8")
    parser.add_argument("--method", choices=["lora", "freeze", "full"], default="lora")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--batch-size", type=int, default=128, help="rows of a step, on all GPUs together"
    )
    parser.add_argument("--cold", action="store_true", help="empties Triton's cache before")
    parser.add_argument("--append", type=Path, help="add the line to this file as well")
    args = parser.parse_args()
    model, run = args.folder / args.model, args.folder / "run"
    if not model.is_dir():
        base_model(model, args.model)
    job(run, model, args.precision, args.method, args.gpus, args.steps, args.batch_size)
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton/cache"))
    if args.cold:
        shutil.rmtree(cache, ignore_errors=True)
    cold = not cache.is_dir() or not any(cache.iterdir())
    began, seconds = train(run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    started = next(e for e in events if e["event"] == "started")
    steps = [e for e in events if e["event"] == "step"]
    line = {
        "model": args.model,
        "precision": args.precision,
        "method": args.method,
        "gpus": args.gpus,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "triton_cache": "cold" if cold else "warm",
        "started_s": round(started["t"] - began, 1),
        "first_step_s": round(steps[0]["t"] - began, 1),
        "whole_s": round(seconds, 1),
        "tok_s": round(
            statistics.median(e["tokens_per_second"] for e in steps if e["step"] > 10), 1
        ),
        "gpu_memory_gib": steps[-1]["gpu_memory_gib"],
        "loss_first": round(steps[0]["loss"], 4),
        "loss_last": round(steps[-1]["loss"], 4),
        "grad_norm_last": round(steps[-1]["grad_norm"], 5),
        "kernels": started["kernels"],
        "device": started["device"],
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.real_job " + " ".join(sys.argv[1:]),
    }
    tell(line, args.append)
    learned = line["loss_last"] < line["loss_first"] and line["grad_norm_last"] > 0
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
