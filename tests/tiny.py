"""Tiny random models, a tokenizer and rows for the trainer's tests, and readers of what a run
wrote."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from machine import free_port

CORPUS = [
    "Below is an instruction that describes a task.",
    "### Instruction: What is 1 + 2?",
    "### Response: 你好, it is three",
    "USER: ASSISTANT: hi",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, **settings: Any) -> None:
    """A byte-level BPE of 300-odd ids with ChatML's tokens; </s> ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told | settings))


def write_model(folder: Path, kind: str = "llama", **changes: Any) -> None:
    """A random model of two layers, 32 wide: llama (all heads), gqa (4 heads, 2 for k and v), qwen2
    (biases), gpt2."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    torch.manual_seed(7)
    common: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attention_dropout": 0.0,
    }
    if kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=320,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    elif kind == "qwen2":
        config = Qwen2Config(**common | {"num_key_value_heads": 4} | changes)
    else:
        config = LlamaConfig(
            **common | {"num_key_value_heads": 2 if kind == "gqa" else 4} | changes
        )
    model = AutoModelForCausalLM.from_config(config)
    # larger than transformers' start values, so that attention is not uniform
    for parameter in model.parameters():
        torch.nn.init.normal_(
            parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15 if parameter.ndim > 1 else 0.02
        )
    model.save_pretrained(folder)
    write_tokenizer(folder)


def rows(count: int = 24) -> list[dict[str, str]]:
    """Alpaca rows of uneven length."""
    return [
        {
            "instruction": f"Say number {n}" + " please" * (n % 7),
            "input": "" if n % 3 else f"in {n} words",
            "output": f"it is {n} " * (1 + n % 5),
        }
        for n in range(count)
    ]


def events_of(job: Path) -> list[dict[str, Any]]:
    return _whole((job.parent / "events.jsonl").read_text().splitlines())


def _whole(lines: list[str]) -> list[dict[str, Any]]:
    """Lines that are JSON: one that a kill cut short is not there."""
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def manifest_of(job: Path) -> dict[str, Any]:
    return json.loads((job.parent / "result" / "manifest.json").read_text())


def adapter_sha256(job: Path) -> str:
    return str(manifest_of(job)["files"]["adapter.zip"]["sha256"])


# -- runs in processes of their own, which may be killed -------------------------------------------


def start(job: Path, world: int = 1) -> list[Any]:
    """Forks `world` ranks that run `job`; this process has imported torch already, so they start at
    once. They end with the trainer's code."""
    import multiprocessing

    import matplotlib.backends.backend_agg  # noqa: F401 - imported once here, not in every rank
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import trainer.train  # noqa: F401

    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(job, rank, world, port)) for rank in range(world)
    ]
    # what an earlier test left (a process group, say) must not be collected in a fork: its threads
    # are not there, and the process aborts
    gc.collect()
    gc.freeze()
    for rank, process in enumerate(processes):
        process.said = job.parent / f"stderr{rank}.txt"  # type: ignore[attr-defined]
        process.start()
    gc.unfreeze()
    return processes


def _rank(job: Path, rank: int, world: int, port: int) -> None:
    import faulthandler
    import os
    import signal
    import sys

    import torch
    from accelerate.state import AcceleratorState, PartialState

    torch.set_num_threads(1)
    PartialState._shared_state.clear()
    AcceleratorState._shared_state.clear()
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    sys.stderr = open(job.parent / f"stderr{rank}.txt", "a")  # noqa: SIM115 - ends with the process
    faulthandler.register(signal.SIGUSR1, sys.stderr)
    sys.argv = ["train", str(job)]
    from trainer.train import main

    main()


def finish(processes: list[Any], seconds: float = 120) -> list[int]:
    """Waits for the ranks and returns their exit codes; what is still there after `seconds` tells
    where it stands, and is killed."""
    import os
    import signal

    for process in processes:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1)
            process.kill()
            process.join()
            print(process.said.read_text())
    return [process.exitcode for process in processes]


def wait_for(condition: Any, seconds: float = 120) -> None:
    """Polls until `condition()`; fails the test after `seconds`."""
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


def step_reached(job: Path) -> int:
    """The last step that the run told of, 0 before."""
    path = job.parent / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((row["step"] for row in _whole(lines) if row["event"] == "step"), default=0)
