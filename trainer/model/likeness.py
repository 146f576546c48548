"""Compares what trains here with stock transformers, on a small copy of the job's model.

The copy has the job's classes and widths, random weights, two layers or as many as show every kind
of layer, a short vocabulary, and windows and length limits shortened until its rows pass them. The
loss and the gradients of the adapters of rows packed (or padded) as in training must equal those of
each row alone, in transformers' eager attention with PEFT's own forward, in fp32. On a GPU the same
is then asked of the job's precision: no further off than eager attention in bf16 is.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WINDOW = 16
ROWS = (40, 57, 20, 33)  # tokens; longer than the window, and on both sides of LIMIT
LIMIT = 36  # the length at which angles change, where they depend on a row's length
VOCABULARY = 256
MAX_LAYERS = 8
LOSS, GRADIENT = 1e-4, 1e-2  # what fp32 explains: of the mean loss, of a tensor's largest gradient
WORSE = 4.0  # times as far from fp32 as eager attention in bf16, at most
PRECISION = 0.05  # of a gradient's norm, that bf16 may be off anyway


@dataclass(frozen=True)
class Difference:
    """Of two ways: of the mean loss, and of the gradient that differs most, with its name."""

    loss: float
    gradient: float
    name: str


class Unlike(RuntimeError):
    """What trains here is not what transformers computes."""


def small(config: Any) -> Any:
    """The job's configuration (transformers' own object) with few layers, a short vocabulary and
    short windows."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    _shorten(text)
    for name, part in list(vars(made).items()):
        if part is not text and hasattr(part, "model_type"):  # towers for pictures and sound
            for key in ("num_hidden_layers", "depth", "num_layers", "encoder_layers"):
                if isinstance(getattr(part, key, None), int):
                    setattr(part, key, 1)
            del name
    return made


def _shorten(text: Any) -> None:
    layers = text.num_hidden_layers
    kept = _layers(text)
    for key, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > 1:
            setattr(text, key, value[:kept])
    settings = {
        "num_hidden_layers": kept,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW,
        "first_k_dense_replace": 1,
        "num_kv_shared_layers": 0,
        "max_window_layers": 0,
    }
    for key, value in settings.items():
        if getattr(text, key, None):
            setattr(text, key, value)
    for key, token in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)):
        if getattr(text, key, None) is not None:
            setattr(text, key, token)
    _shorten_angles(text)


def _shorten_angles(text: Any) -> None:
    """Where angles depend on a row's length: they change within our rows."""
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        kind = str(part.get("rope_type"))
        if kind == "longrope":
            part["original_max_position_embeddings"] = LIMIT
            if hasattr(text, "original_max_position_embeddings"):
                text.original_max_position_embeddings = LIMIT
        elif "dynamic" in kind:
            text.max_position_embeddings = LIMIT


def _layers(text: Any) -> int:
    """The fewest first layers, two at least, that show every kind."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    last = max((list(kinds).index(k) for k in set(kinds)), default=0)
    dense = getattr(text, "first_k_dense_replace", 0) or 0
    return min(int(text.num_hidden_layers), MAX_LAYERS, max(2, last + 1, 2 if dense else 0))


@torch.no_grad()
def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Large enough that attention is not uniform and experts differ."""
    g = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.is_floating_point() or "A_log" in name or "dt_bias" in name:
            continue
        if "sinks" in name:
            p.normal_(1.0, 1.0, generator=g)
        elif p.ndim >= 2:
            p.normal_(0.0, min(0.5, 1.2 * p.shape[-1] ** -0.5), generator=g)
        else:
            p.add_(torch.randn(p.shape, generator=g, device=p.device) * 0.05)


def rows(device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=g).to(device) for n in ROWS]


def packed(documents: list[Tensor]) -> dict[str, Any]:
    """As trainer.data.batch.packed makes it, with every token a target."""
    device = documents[0].device
    lengths = [len(d) for d in documents]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    labels = torch.cat([torch.cat([d[1:], d.new_tensor([-100])]) for d in documents])[None]
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
        "labels": labels,
        "targets_at": (labels.flatten() != -100).nonzero().flatten(),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def padded(documents: list[Tensor]) -> dict[str, Any]:
    """As trainer.data.batch.padded makes it, with every token a target."""
    longest = max(len(d) for d in documents)

    def fill(parts: list[Tensor], empty: int) -> Tensor:
        return torch.stack(
            [nn.functional.pad(p, (0, longest - len(p)), value=empty) for p in parts]
        )

    labels = fill([torch.cat([d[1:], d.new_tensor([-100])]) for d in documents], -100)
    return {
        "input_ids": fill(documents, 0),
        "attention_mask": fill([torch.ones_like(d) for d in documents], 0),
        "position_ids": fill([torch.arange(len(d), device=d.device) for d in documents], 0),
        "labels": labels,
        "targets_at": (labels.flatten() != -100).nonzero().flatten(),
    }


Gradients = dict[str, Tensor]


def alone(model: nn.Module, documents: list[Tensor]) -> tuple[float, Gradients]:
    """(mean loss, gradients of what trains) of each row by itself, by the model's own forward."""
    model.zero_grad()
    total, targets = 0.0, sum(len(d) - 1 for d in documents)
    for d in documents:
        logits = model(input_ids=d[None], use_cache=False).logits[0]
        loss = cross_entropy(logits[:-1].float(), d[1:], reduction="sum")
        loss.backward()
        total += float(loss)
    return total / targets, gradients(model)


def together(
    model: nn.Module, batch: dict[str, Any], loss_of: Callable[[nn.Module, dict[str, Any]], Tensor]
) -> tuple[float, Gradients]:
    """The same of one batch, by the trainer's own loss."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return float(loss.detach()) / len(batch["targets_at"]), gradients(model)


def gradients(model: nn.Module) -> Gradients:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().float().clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def difference(got: tuple[float, Gradients], want: tuple[float, Gradients]) -> Difference:
    """In fp32: the gradient that differs most, of that tensor's largest."""
    apart = {
        n: float((got[1][n] - g).abs().max() / g.abs().max().clamp_min(1e-6))
        for n, g in want[1].items()
    }
    name = max(apart, key=lambda n: apart[n], default="")
    return Difference(abs(got[0] - want[0]), apart.get(name, 0.0), name)


def of_norm(got: Gradients, want: Gradients) -> tuple[float, str]:
    """In a lower precision: the gradient that is furthest off, of its norm."""
    apart = {
        n: float((got[n] - g).norm() / g.norm().clamp_min(1e-12))
        for n, g in want.items()
        if g.norm() > 1e-6
    }
    name = max(apart, key=lambda n: apart[n], default="")
    return apart.get(name, 0.0), name


def validate(found: Difference, what: str) -> None:
    """Raises Unlike, with the module, where fp32 does not explain the difference."""
    if found.loss > LOSS or found.gradient > GRADIENT:
        module = found.name.partition(".lora_")[0].removeprefix("base_model.model.")
        raise Unlike(
            f"{what} is not what transformers' eager attention computes of each row alone: the "
            f"loss differs by {found.loss:.2g}, the gradient of {module} by {found.gradient:.1%}"
        )


def free() -> None:
    """Gives the copy's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
