"""Gated delta nets (Qwen3.5, Qwen3.6) over packed rows: neither the recurrent state nor the causal
convolution before it crosses a document boundary.

transformers passes the boundaries to the rule alone, and refuses them without fla-core; with it,
its training fails on Hopper under Triton 3.4 to 3.7. ``by_document`` replaces the modules' forward
by one that separates documents in both: in plain torch, and on a GPU with the rule of
``trainer/kernels/delta_fla.py``. Where ``why_not`` gives a reason, rows must be computed one by
one, in plain torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from inspect import unwrap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trainer.kernels import delta_reference as reference
from trainer.kernels.backend import is_old
from trainer.kernels.spans import spans

log = logging.getLogger(__name__)

CLASSES = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
CACHES = ("cache_params", "cache")  # ``cache`` since transformers 5.24
TOLERANCE = 0.03  # relative error in bf16; rounding gives a quarter of it
ENDS = [0, 70, 73, 200]  # documents of the check, on both sides of a chunk of 64
_refused: list[str] = []  # the reason, once it is known


def nets(model: nn.Module) -> list[Any]:
    """The model's gated delta nets."""
    return [m for m in model.modules() if type(m).__name__ in CLASSES]


def use_plain(model: nn.Module) -> None:
    """Make transformers' own forward of these nets compute in plain torch in this process, even
    where fla-core is installed: its kernels need a GPU, and refuse some."""
    names = ["torch_chunk_gated_delta_rule"]
    if not torch.cuda.is_available():
        names.append("torch_recurrent_gated_delta_rule")
    for code in {sys.modules[type(net).__module__] for net in nets(model)}:
        for name in names:
            setattr(code, name, unwrap(getattr(code, name)))


def by_document(model: nn.Module) -> int:
    """Make every gated delta net of the model keep the documents of a pack apart. Returns how many
    there are; safe to call twice."""
    use_plain(model)
    found = nets(model)
    for module in found:
        if not hasattr(module, "with_cache"):
            module.with_cache = module.forward
            module.forward = partial(_forward, module)
    return len(found)


def _forward(module: Any, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
    """Replaces the module's own forward, which still computes calls with a cache. Without
    boundaries each row is a document."""
    if args or any(more.get(name) is not None for name in CACHES):
        out: Tensor = module.with_cache(hidden_states, *args, **more)
        return out
    rows, tokens, _ = hidden_states.shape
    cu, mask = more.get("cu_seq_lens_q"), more.get("attention_mask")
    if mask is not None:
        hidden_states = (hidden_states * mask[:, :, None]).to(hidden_states.dtype)
    if cu is None:
        ends = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32)
        cu = ends.to(hidden_states.device)
    elif rows != 1:
        raise ValueError(f"a pack is one row, got {rows}")
    mixed = _mixed(module, hidden_states, cu)
    return cast(Tensor, module.out_proj(mixed.view(rows, tokens, -1)))


def _mixed(module: Any, x: Tensor, cu: Tensor) -> Tensor:
    """The input of the last projection, [tokens of all rows, HV V]."""
    keys, values = module.key_dim, module.value_dim
    joined, b, a, z = (
        getattr(module, f"in_proj_{name}")(x).flatten(0, 1) for name in ("qkv", "b", "a", "z")
    )
    first = spans(cu, len(joined)).first
    joined = reference.convolve(joined, module.conv1d.weight[:, 0], first)
    q, k, v = joined.split([keys, keys, values], 1)
    q, k = (reference.unit(x.unflatten(1, (-1, module.head_k_dim))) for x in (q, k))
    decay = -module.A_log.float().exp() * softplus(a.float() + module.dt_bias)
    v = v.unflatten(1, (-1, module.head_v_dim))
    out = rule(q, k, v, decay, b.float().sigmoid(), cu)
    normed = module.norm(out.flatten(0, 1), z.reshape(-1, module.head_v_dim))
    return cast(Tensor, normed.view(len(joined), -1))


def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor) -> Tensor:
    """The gated delta rule within documents, differentiable. q, k [M, HK, D] of unit norm, v [M,
    HV, E], decay (logarithms) and beta [M, HV], cu int32 [documents + 1] -> [M, HV, E]."""
    if q.dtype is not torch.bfloat16 or why_not(q.device):
        return reference.rule(q, k, v, decay, beta, cu)
    from trainer.kernels import delta_fla

    return delta_fla.rule(q, k, v, decay, beta, cu)


# -- whether rows may be packed ------------------------------------------------------------------


def why_not(device: torch.device, precision: str = "bf16") -> str:
    """Why rows of a model with gated delta nets cannot be packed on `device`, or ""."""
    if device.type != "cuda":
        return ""
    if precision in ("fp32", "fp16"):
        return f"gated delta nets in {precision} are computed row by row on a GPU"
    if why := _refused[0] if _refused else _missing():
        return why
    old = "gated delta nets are computed row by row below compute capability 8.0"
    return old if is_old(device) else ""


@cache
def _missing() -> str:
    try:
        from trainer.kernels import delta_fla
    except Exception as why:  # errors of importing Triton and fla-core share no class
        return f"gated delta nets are packed by fla-core, which does not serve here: {why}"
    return delta_fla.unfit()


def distrust(why: str) -> None:
    """Refuse packs of gated delta nets from now on in this process; logs ``why``."""
    _refused.append(f"gated delta nets are computed row by row: {why}")
    log.warning(_refused[-1])


@torch.no_grad()
def trust(config: dict[str, Any], device: torch.device) -> None:
    """Compare the rule on this GPU with its definition, at the sizes of a config.json, and refuse
    packs where they differ. Runs once per process and size."""
    if device.type == "cuda" and not why_not(device):
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        _trust(device, *(int(config[f"linear_{name}"]) for name in names))


@cache
def _trust(device: torch.device, keys: int, values: int, key_dim: int, value_dim: int) -> None:
    from trainer.kernels import delta_fla, triton_ops

    sizes = (keys, values, key_dim, value_dim)
    try:
        if delta_fla.PINNED:
            with triton_ops.only_compiling():  # in parallel
                rule_error(device, *sizes)
        error = rule_error(device, *sizes)
    except Exception as why:  # too little memory, no such instruction: Triton's share no class
        distrust(f"the rule of fla-core does not run here ({type(why).__name__}: {why})")
        return
    if not error < TOLERANCE:
        distrust(f"the rule of fla-core is off by {error:.4f} on this GPU")


def rule_error(device: torch.device, keys: int, values: int, key_dim: int, value_dim: int) -> float:
    """The largest relative error of fla-core's output and gradients in bf16 against the plain rule
    in fp32, over documents of several lengths."""
    from trainer.kernels import delta_fla

    g = torch.Generator(device).manual_seed(0)
    m, cu = ENDS[-1], torch.tensor(ENDS, dtype=torch.int32, device=device)

    def random(*shape: int) -> Tensor:
        return torch.randn(m, *shape, generator=g, device=device)

    q, k = (reference.unit(random(keys, key_dim)).bfloat16() for _ in range(2))
    v, dout = random(values, value_dim).bfloat16(), random(values, value_dim).bfloat16()
    decay, beta = -random(values).exp() * 0.2, random(values).sigmoid()
    results, ways = [], (delta_fla.rule, reference.rule)
    for way in cast(tuple[Callable[..., Tensor], ...], ways):
        given = [x.detach().requires_grad_() for x in (q, k, v, decay, beta)]
        if way is reference.rule:
            given = [x.detach().float().requires_grad_() for x in given]
        with torch.enable_grad():
            out = way(*given, cu)
        results.append([out, *torch.autograd.grad(out, given, dout.to(out.dtype))])
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("inf")
