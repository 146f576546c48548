"""How fast answers come: one line of JSON for each model, precision and number of rows.

    python -m bench.decode qwen3-4b:bf16 llama-7b:fp8 --append bench/results/decode.jsonl
    python -m bench.decode qwen3-4b:bf16 --widths 32 --plain     (transformers' and PEFT's layers)
    python -m bench.decode qwen3-4b:bf16 --widths 32 --serve     (over HTTP, `milktea serve`'s)

A random-weight model with LoRA r 32 on all linears, adapters unmerged, prompts of 128 tokens,
answers of `--new` tokens, greedy. `tok_s` counts the answers' tokens over the whole call, the
prompts' reading and the capture of graphs included; `steady_tok_s` is what remains when an eighth
of the length is taken off at both ends of the fraction: the decoding alone. `of_copy` is how fast
weights, adapters and keys are read by it, over the card's own rate of copying.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.families import build, gemm_tflops
from bench.rows import Setting
from bench.shapes import SHAPES
from bench.training import GIB, tell

PROMPT = 128
WIDTHS = (1, 8, 32, 64, 128)


def prompts_of(width: int, vocab: int) -> list[list[int]]:
    dice = torch.Generator().manual_seed(width)
    drawn = torch.randint(10, vocab - 10, (width, PROMPT), generator=dice)
    return [[int(i) for i in row] for row in drawn]


def settled(device: torch.device) -> float:
    """The time, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 4 GiB on the device."""
    if device.type != "cuda":
        return 1e10
    x = torch.ones(2 << 30, dtype=torch.int16, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    began = settled(device)
    for _ in range(10):
        y.copy_(x)
    return 10 * 2 * x.nbytes / (settled(device) - began)


def bytes_a_step(model: nn.Module, precision: str, width: int, keys: float) -> float:
    """Read by a step: weights in their precision, adapters in bf16, `keys` tokens of each row."""
    from trainer.model.parts import causal

    inner: Any = causal(model)
    config = inner.config
    tower = inner.model
    each = {"bf16": 2.0, "fp8": 1.0, "nf4": 0.5625, "fp32": 4.0}[precision]
    base: int = sum(
        g.weight.shape[0] * g.weight.shape[1] for f in tower.fast_layers for g in f.groups
    )
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    head = 2 * config.vocab_size * config.hidden_size
    read: float = base * each + 2 * adapters + head + width * keys * kept
    return read


def leave_fused(model: nn.Module) -> None:
    """Lets transformers' and PEFT's layers decode, one launch after another."""
    from trainer.model import steps

    tower = steps.tower_of(model)
    tower.steps_trusted, tower.looked_up = False, None
    for fast in tower.fast_layers:
        fast.steps = False


def by_generate(model: nn.Module, vocab: int, device: torch.device) -> Callable[[int, int], int]:
    """ask(width, new tokens) -> tokens made, by trainer.model.decode."""
    from trainer.model.decode import generate

    def ask(width: int, new: int) -> int:
        found = generate(model, prompts_of(width, vocab), {vocab}, device, new, width=width)
        return sum(len(a.ids) for a in found)

    return ask


@contextmanager
def served(
    model: nn.Module, vocab: int, device: torch.device, width: int
) -> Iterator[Callable[[int, int], int]]:
    """ask(width, new tokens) -> tokens made, over HTTP on loopback, a request for each answer."""
    import aiohttp
    from aiohttp import web

    from bench.real_job import tokenizer
    from trainer.data.prepare import Prepared
    from trainer.data.template import load
    from trainer.data.tokenised import Rows
    from trainer.data.tokens import open_vocabulary, token_hash
    from trainer.serve.app import application
    from trainer.serve.engine import Engine
    from trainer.serve.models import Models, Voice

    folder = Path("/tmp/bench-decode-words")
    folder.mkdir(exist_ok=True)
    words, template = tokenizer(folder, vocab), load("alpaca")
    vocabulary = open_vocabulary(folder)
    data = Prepared(Rows.empty(), vocabulary, template, 2, token_hash(vocabulary, template))
    voices = {"tuned": Voice("tuned", data, "default", frozenset({vocab}))}
    engine = Engine(Models(model, voices, device), width)
    token, up, loop = "t" * 43, threading.Event(), asyncio.new_event_loop()
    where: list[int] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = web.AppRunner(application(engine, token, folder), handler_cancellation=True)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        where.append(int(runner.addresses[0][1]))
        up.set()
        loop.run_forever()

    threading.Thread(target=run, daemon=True).start()
    up.wait(30)

    async def one(session: aiohttp.ClientSession, k: int, new: int) -> int:
        text = " ".join(words[(k * PROMPT + i) % len(words)] for i in range(PROMPT))
        body = {"model": "tuned", "prompt": text, "max_tokens": new, "temperature": 0}
        url = f"http://127.0.0.1:{where[0]}/v1/completions"
        async with session.post(url, json=body) as answer:
            told = await answer.json()
            if answer.status != 200:
                raise RuntimeError(str(told))
            return int(told["usage"]["completion_tokens"])

    async def every(asked: int, new: int) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        limits = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, connector=limits) as session:
            return sum(await asyncio.gather(*(one(session, k, new) for k in range(asked))))

    try:
        yield lambda asked, new: asyncio.run(every(asked, new))
    finally:
        engine.close()
        loop.call_soon_threadsafe(loop.stop)


def measure(
    ask: Callable[[int, int], int], width: int, new: int, device: torch.device
) -> dict[str, float]:
    """Tokens a second of `width` answers."""
    few = max(1, new // 8)
    ask(width, few)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken, made = [], []
    for tokens in (few, new):
        began = settled(device)
        made.append(ask(width, tokens))
        taken.append(settled(device) - began)
    return {
        "tok_s": round(made[1] / taken[1], 1),
        "steady_tok_s": round((made[1] - made[0]) / (taken[1] - taken[0]), 1),
        "whole_s": round(taken[1], 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }


def lines(name: str, asked: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    shape, precision = name.split(":")
    vocab = int(SHAPES[shape][1]["vocab_size"])
    model, names = build(Setting(shape, precision, r=asked.r), asked.layers, device)
    randomise_adapters(model)
    copied = copy_rate(device)
    if asked.plain:
        from trainer.model import steps

        steps.trust_steps(steps.tower_of(model))
        leave_fused(model)
    if asked.profile:
        write_profile(by_generate(model, vocab, device), asked.widths[0], asked.profile)
        return
    for width in asked.widths:
        if asked.serve:
            with served(model, vocab, device, width) as ask:
                ask(width, asked.new)  # a server's rows grow once, and its graphs are captured
                found = measure(ask, width, asked.new, device)
        else:
            found = measure(by_generate(model, vocab, device), width, asked.new, device)
        seconds = width / found["steady_tok_s"]
        read = bytes_a_step(model, precision, width, PROMPT + asked.new * 9 / 16)
        yield {
            "model": shape,
            "precision": precision,
            "width": width,
            **found,
            "of_copy": round(read / seconds / copied, 3),
            "copy_tb_s": round(copied / 1e12, 2),
            "way": "served" if asked.serve else "plain" if asked.plain else "fused, graphs",
            "new": asked.new,
            "prompt": PROMPT,
            "r": asked.r,
            "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "layer": names["layer"],
            "date": time.strftime("%Y-%m-%d"),
        }


def write_profile(ask: Callable[[int, int], int], width: int, out: Path) -> None:
    """The kernels of 32 steps of decoding, by time."""
    ask(width, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        ask(width, 32)
        torch.cuda.synchronize()
    table = seen.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
    )
    out.write_text(table)


@torch.no_grad()
def randomise_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.01)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME:PRECISION, NAME of " + ", ".join(SHAPES))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--plain", action="store_true", help="transformers' and PEFT's layers")
    parser.add_argument("--serve", action="store_true", help="over HTTP")
    parser.add_argument("--profile", type=Path, help="write a call's kernels to this file instead")
    parser.add_argument("--append", type=Path, help="add the lines to this file")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = round(gemm_tflops(device), 1) if device.type == "cuda" else 0.0
    wrong = 0
    for name in asked.models:
        try:
            for line in lines(name, asked, device):
                tell(line | {"gemm_tflops": rate}, asked.append)
        except (RuntimeError, ValueError) as why:
            told = {"model": name, "error": f"{type(why).__name__}: {str(why)[:400]}"}
            print(json.dumps(told), file=sys.stderr, flush=True)
            wrong += 1
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
