"""Measures a merge: the written files, re-opened by stock transformers, are compared with the base
and its adapter on real texts.

Numbers are nats over the tokens of the texts: mean KL of the merged model from the adapted one, its
share of the adapter's own effect (KL of the base), the KL that computing in bf16 alone makes (the
noise floor), the largest difference of a text's own log-probability, and how often the likeliest
token is the same; where a training held the base in fewer bits, also the KL of base and adapter
from what it was trained on, which refuses nothing. A merge passes when its KL is at most 1 % of the
effect and at most twice the noise floor, and no token is off by more than half a nat.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.data.weights import weight_files
from trainer.result.held import FEWER_BITS, round_base

MAX_SHARE, MAX_NOISE, MAX_TOKEN_NATS = 0.01, 2.0, 0.5
MAX_TOKENS = 512  # of one text
ROUND_BYTES = 1 << 30  # of what a model says of the texts of one round, in fp32
GPU_BYTES = 3 << 30  # beside the weights: activations, what is said of one text, CUDA's own
GENERAL = Path(__file__).parent / "general_texts.json"
# two sums of the same numbers in another order differ by this much in fp32
_ROUNDING_NATS = 1e-6


class NotCertified(RuntimeError):
    """The written model is not base + adapter; `numbers` say by how much."""

    def __init__(self, message: str, numbers: dict[str, Any]) -> None:
        super().__init__(message)
        self.numbers = numbers


def certify(
    adapter: Path,
    base: Path,
    merged: Path,
    texts: Sequence[str] = (),
    device: str = "cpu",
    tell: Callable[[str], None] = lambda line: None,
    precision: str = "",
) -> dict[str, Any]:
    """Compare `merged` with `base` + `adapter` on `texts` and on general ones (English, Chinese,
    code), both read and computed in fp32, one after the other: memory holds one of them, and what
    the other said of the texts of one round. `tell` hears of each text; `precision` is the one in
    which the training held the base. Returns the certificate. Raises NotCertified where the files
    compute something else, or where the adapter does nothing at all."""
    told = [*json.loads(GENERAL.read_text(encoding="utf-8")), *texts]
    tokenizer = open_tokenizer(base)
    _validate_tokenizer(tokenizer, open_tokenizer(merged), told)
    rows = [ids for text in told if len(ids := tokenizer(text)["input_ids"][:MAX_TOKENS]) > 1]
    sums: dict[str, Any] = {"kl": 0.0, "effect": 0.0, "noise": 0.0, "same": 0, "tokens": 0}
    if precision in FEWER_BITS:
        sums["trained"] = 0.0
    worst, done = 0.0, 0
    for part in _rounds(rows, base):
        ids = list(_batches(part, device))
        names = [f"text {done + n} of {len(rows)}" for n in range(1, len(part) + 1)]
        tell(f"certificate: base and adapter, from {names[0]}")
        said = _adapted(base, adapter, ids, device, sums, precision)
        written = _open(merged, device)
        for n, (its, held) in enumerate(zip(ids, said, strict=True)):
            tell(f"certificate: the merged model, {names[n]}")
            right, wrong = held.to(device), _log_probs(written, its)
            sums["kl"] += _kl(right, wrong)
            sums["same"] += int((right.argmax(-1) == wrong.argmax(-1)).sum())
            sums["tokens"] += right.shape[0]
            own = its[0, 1:, None]
            worst = max(worst, float((right - wrong).gather(-1, own).abs().max()))
        done += len(part)
        _free(written)
        del said
    tokens = sums["tokens"]
    numbers = {
        "texts": len(rows),
        "texts_sha256": hashlib.sha256("\0".join(told).encode()).hexdigest(),
        "tokens": tokens,
        "kl_nats": sums["kl"] / tokens,
        "effect_nats": sums["effect"] / tokens,
        "share_of_effect": sums["kl"] / sums["effect"] if sums["effect"] else None,
        "bf16_noise_nats": sums["noise"] / tokens,
        "max_token_nats": worst,
        "same_top_token": sums["same"] / tokens,
    }
    if "trained" in sums:
        numbers |= {"trained_in": precision, "trained_kl_nats": sums["trained"] / tokens}
    if why := _defect(numbers):
        raise NotCertified(why, numbers)
    return numbers


def certificate_text(out: Path, made: dict[str, Any]) -> str:
    """The certificate in words."""
    numbers, merged = made["numbers"], made["merge"]
    share, dtype = numbers["share_of_effect"], merged["dtype"]
    trained = (
        f"\n  KL from what was trained {numbers['trained_kl_nats']:.2g} nats a token: the training "
        f"held the base in {numbers['trained_in']}"
        if "trained_in" in numbers
        else ""
    )
    return (
        f"{out}: {merged['changed']} weights merged as {dtype}, {merged['bytes'] / 1e9:.2f} GB\n"
        f"certificate: passed on {numbers['tokens']:,} tokens of {numbers['texts']} texts, the "
        "files re-opened by stock transformers\n"
        f"  KL from base + adapter   {numbers['kl_nats']:.2g} nats a token, {share:.2%} of what "
        "the adapter does (1 % may be lost)\n"
        f"  noise of bf16 alone      {numbers['bf16_noise_nats']:.2g} nats a token\n"
        f"  largest difference       {numbers['max_token_nats']:.2g} nats on one token\n"
        f"  likeliest token equal    {numbers['same_top_token']:.2%}{trained}"
    )


def open_tokenizer(folder: Path) -> Any:
    """Raises ValueError for a folder without a tokenizer.json that can be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder.name}/ has no tokenizer.json, by which the merge is compared")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{folder.name}/tokenizer.json cannot be read: {error}") from error


def _validate_tokenizer(ours: Any, written: Any, texts: Sequence[str]) -> None:
    """Raises NotCertified for a written tokenizer that makes other tokens of a text."""
    for text in texts:
        if ours(text)["input_ids"] != written(text)["input_ids"]:
            raise NotCertified("the tokenizer that was written makes other tokens", {})


def device_for(base: Path) -> str:
    """Where `certify` computes a model of this folder: `cuda` where the first GPU's free memory
    holds it in fp32, else `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    values = 0
    for path in weight_files(base):
        with safe_open(path, "pt") as source:
            shapes = [source.get_slice(name).get_shape() for name in source.keys()]  # noqa: SIM118
        values += sum(math.prod(shape) for shape in shapes)
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free > 4 * values + GPU_BYTES else "cpu"


def _rounds(rows: Sequence[Sequence[int]], base: Path) -> Iterator[list[Sequence[int]]]:
    """The texts in rounds: what a model says of one takes ROUND_BYTES, or half of the base's files
    where that is more. Each round loads both models once."""
    most = max(ROUND_BYTES, sum(path.stat().st_size for path in weight_files(base)) // 2)
    vocabulary = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    part: list[Sequence[int]] = []
    size = 0
    for row in rows:
        needs = 4 * vocabulary * len(row)
        if part and size + needs > most:
            yield part
            part, size = [], 0
        part.append(row)
        size += needs
    if part:
        yield part


def _adapted(
    base: Path,
    adapter: Path,
    batches: Sequence[Tensor],
    device: str,
    sums: dict[str, Any],
    precision: str,
) -> list[Tensor]:
    """What base and adapter say of each text, on the CPU; adds the adapter's effect, the noise of
    bf16 and that of the training's `precision` to `sums`. The model's memory is free when it
    returns."""
    model: Any = PeftModel.from_pretrained(_open(base, device), str(adapter)).eval()
    said = []
    for ids in batches:
        right = _log_probs(model, ids)
        with model.disable_adapter():
            sums["effect"] += _kl(right, _log_probs(model, ids))
        with torch.autocast(device, torch.bfloat16):
            sums["noise"] += _kl(right, _log_probs(model, ids))
        said.append(right.cpu())
    if "trained" in sums:
        round_base(model, precision)
        for ids, right in zip(batches, said, strict=True):
            sums["trained"] += _kl(_log_probs(model, ids), right.to(device))
    _free(model)
    return said


def _free(model: Any) -> None:
    """Gives back the weights' memory at once: the wrappers refer to each other, so the model itself
    waits for the garbage collector."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def _defect(numbers: dict[str, Any]) -> str:
    kl, effect, noise = (numbers[k] for k in ("kl_nats", "effect_nats", "bf16_noise_nats"))
    if not all(x == x for x in (kl, effect, noise)):
        return "one of the models computes numbers that are not finite"
    if effect < _ROUNDING_NATS:
        return "the adapter changes nothing: there is nothing to merge"
    if kl > _ROUNDING_NATS and kl > MAX_SHARE * effect:
        return f"the merge loses {kl / effect:.1%} of what the adapter does (1 % may be lost)"
    if kl > _ROUNDING_NATS and kl > MAX_NOISE * noise:
        return f"the merge differs by {kl:.2g} nats, computing in bf16 by {noise:.2g}"
    if numbers["max_token_nats"] > MAX_TOKEN_NATS:
        return f"one token's log-probability differs by {numbers['max_token_nats']:.2f} nats"
    return ""


def _open(folder: Path, device: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(device).eval()


def _batches(rows: Sequence[Sequence[int]], device: str) -> Iterator[Tensor]:
    for row in rows:
        yield torch.tensor([row], device=device)


@torch.no_grad()
def _log_probs(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of each next token, fp32 (T - 1, V)."""
    return torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)


def _kl(right: Tensor, other: Tensor) -> float:
    """The KL divergence, summed over the tokens."""
    return float((right.exp() * (right - other)).sum())
