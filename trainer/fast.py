"""The fast path: a loaded transformers model (with PEFT's adapters, if any) keeps its classes and parameters, and its decoder layers
compute by ``trainer/layer.py``. What does not fit the fast layer keeps transformers' forward, and the returned names say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer import eager
from trainer.frozen import FrozenWeight, freeze_weight
from trainer.layer import FastLayer, Packed, frozen_norm, run_layer
from trainer.lora import Group, base_linear, frozen_linear, refresh

log = logging.getLogger(__name__)

FUSED_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
# Relative error of the fused layer against its twin, values and gradients. bf16 rounding gives 0.006; where a value falls on the edge
# of an FP8 step the two may round apart, which gives 0.04. A wrong kernel gives 0.3 and more.
TOLERANCE = {"fp8": 0.1}
OTHERWISE = 0.03
Materialise = Callable[[nn.Module], None]


def accelerate_model(
    model: nn.Module,
    precision: str,
    device: torch.device | str,
    *,
    checkpoint_layers: int = 0,
    keep_transpose: bool = False,
    materialise: Materialise | None = None,
) -> dict[str, str]:
    """Move ``model`` to ``device`` layer by layer, freeze the base in ``precision`` ("fp32", "bf16", "fp8", "nf4") and patch in the
    fast path. Returns what runs, by name, for the log and the manifest.

    Load the model on the CPU for fp8 and nf4: no more than one layer is then on the device unquantised. The first
    ``checkpoint_layers`` layers keep only their input. ``keep_transpose``: see ``freeze_weight``. ``materialise`` is called on each
    part of a model built on the meta device and must give it values there. Trainable base weights (full fine-tuning) are refused:
    the fast path has no gradient for them. Not safe to call twice."""
    device = torch.device(device)
    inner = inner_model(model)
    layers: Sequence[nn.Module] = inner.layers  # type: ignore[assignment]
    ops = _load_kernels(device)
    parts = {id(p) for layer in layers for p in layer.parameters()}
    _place(model, device, materialise, skip=parts)
    fast: list[FastLayer] = []
    reasons: list[str] = []
    for i, layer in enumerate(layers):
        _place(layer, device, materialise)
        try:
            fast.append(build_layer(layer, precision, ops, i < checkpoint_layers, keep_transpose))
        except ValueError as why:
            reasons.append(str(why))
            _freeze_linears(layer, precision, keep_transpose)
    names = {"base": _base_name(fast, precision), "attention": "torch flash, variable length" if device.type == "cuda" else "eager"}
    error = _self_test(fast[0]) if fast and ops is not eager else 0.0
    if fast and error < (tolerance := TOLERANCE.get(precision, OTHERWISE)):
        _patch(inner, layers, fast, ops)
        names["layer"] = f"fused, {len(fast)} of {len(layers)}" + (", eager twin" if ops is eager else f", self-test {error:.4f}")
        names["checkpointed_layers"] = f"{sum(f.checkpoint for f in fast)} of {len(layers)}"
    else:
        names["layer"] = f"transformers: self-test error {error:.4f}, at most {tolerance}" if fast else "transformers"
        log.warning("the fused layer is not used: %s", names["layer"])
    if reasons:
        names["not_fused"] = f"{len(reasons)} layers: {reasons[0]}"
    names["loss"] = "chunked, frozen head" + ("" if ops is eager else ", Triton")
    return names


def inner_model(model: nn.Module) -> nn.Module:
    """The part that has ``layers``: LlamaModel inside PeftModel inside anything."""
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no list of decoder layers named 'layers': run it without the fast path")


def _load_kernels(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return eager
    try:
        from trainer import kernels
    except ImportError as why:
        log.warning("Triton is not usable (%s): plain torch does its work", why)
        return eager
    return kernels


def _place(module: nn.Module, device: torch.device, materialise: Materialise | None, skip: set[int] | None = None) -> None:
    """Move a module's tensors, leaf by leaf, without those of ``skip``; meta tensors become empty ones that ``materialise`` fills."""
    for leaf in module.modules():
        own = list(leaf.parameters(recurse=False)) + list(leaf.buffers(recurse=False))
        if not own or (skip and any(id(t) in skip for t in own)):
            continue
        if any(t.is_meta for t in own):
            if materialise is None:
                raise ValueError(f"{type(leaf).__name__} is on the meta device and nothing was given to fill it")
            leaf.to_empty(device=device, recurse=False)
            materialise(leaf)
        else:
            leaf._apply(lambda t: t.to(device), recurse=False)


def build_layer(layer: nn.Module, precision: str, ops: ModuleType, checkpoint: bool, keep_transpose: bool) -> FastLayer:
    """The fast form of one decoder layer. Raises ValueError with the reason, and leaves the layer as it was, where it does not fit."""
    name = type(layer).__name__
    if name not in FUSED_CLASSES:
        raise ValueError(f"{name} is not of a kind that the fused layer knows")
    attn, mlp = layer.self_attn, layer.mlp
    config = attn.config  # type: ignore[union-attr]
    groups = [[attn.q_proj, attn.k_proj, attn.v_proj], [attn.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]  # type: ignore[union-attr]
    linears = [base_linear(m) for group in groups for m in group]  # type: ignore[arg-type]
    _check_fits(layer, linears, config)
    dtype = linears[0].weight.dtype
    first = linears[0].bias
    bias = torch.cat([x.bias.data for x in linears[:3]]) if first is not None else None
    built = [Group.of(g, precision, dtype, **_options(precision, keep_transpose)) for g in groups]  # type: ignore[arg-type]
    for group, modules in zip(built, groups, strict=True):
        _route(group.weight, [base_linear(m) for m in modules], precision)  # type: ignore[arg-type]
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    return FastLayer(
        ops, *built, norm1.weight.data, norm2.weight.data, bias, norm1.variance_epsilon, norm2.variance_epsilon,  # type: ignore[union-attr, arg-type]
        config.num_attention_heads, config.num_key_value_heads, attn.head_dim, attn.scaling, checkpoint,  # type: ignore[union-attr, arg-type]
    )  # fmt: skip


def _check_fits(layer: nn.Module, linears: list[nn.Linear], config: Any) -> None:
    from trainer.lora import adapter_of, padded_rank

    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act} is not silu")
    if getattr(layer.self_attn, "sliding_window", None):
        raise ValueError("attention has a sliding window")
    biases = [x.bias is not None for x in linears]
    if any(biases[3:]) or len(set(biases[:3])) != 1:
        raise ValueError("a linear other than q, k, v has a bias")
    if any(type(x) is not nn.Linear for x in linears):
        raise ValueError("a linear is of a special class")
    if any(x.weight.requires_grad for x in linears) or any(
        p.requires_grad for n in ("input_layernorm", "post_attention_layernorm") for p in getattr(layer, n).parameters()
    ):
        raise ValueError("base weights train")
    head_dim = layer.self_attn.head_dim  # type: ignore[union-attr]
    if head_dim & (head_dim - 1) or head_dim < 32:
        raise ValueError(f"head size {head_dim} is not a power of two from 32 on")
    found = [adapter_of(m) for m in layer.modules() if hasattr(m, "lora_A")]
    ranks = [a[0].shape[0] for a in found if a]
    if ranks and padded_rank(max(ranks)) > 64:
        raise ValueError(f"rank {max(ranks)} is above 64")


def _options(precision: str, keep_transpose: bool) -> dict[str, bool]:
    return {"keep_transpose": keep_transpose} if precision == "fp8" else {}


def _route(weight: FrozenWeight, linears: list[nn.Linear], precision: str) -> None:
    """Give quantised linears a forward of their own, for calls that are not packed (generation)."""
    if precision in ("bf16", "fp32"):
        return
    start = 0
    for linear in linears:
        part = weight.rows(start, start + linear.out_features)
        linear.forward = lambda x, part=part, bias=linear.bias: frozen_linear(x, part, bias)  # type: ignore[method-assign, misc]
        start += linear.out_features


def _freeze_linears(layer: nn.Module, precision: str, keep_transpose: bool) -> None:
    """The fall-back of one layer: transformers' forward over quantised linears; bf16 stays as it is."""
    if precision in ("bf16", "fp32"):
        return
    for module in layer.modules():
        if getattr(module, "use_dora", {}) and any(module.use_dora.values()):
            raise ValueError(f"DoRA reads the base weight, which {precision} replaces: use precision bf16, or use_dora false")
    for name, module in layer.named_modules():
        if type(module) is nn.Linear and "lora_" not in name and not module.weight.requires_grad:
            weight = freeze_weight(module.weight.data, precision, **_options(precision, keep_transpose))
            _route(weight, [module], precision)
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _base_name(fast: list[FastLayer], precision: str) -> str:
    if precision != "fp8" or not fast:
        return precision
    weight: Any = fast[0].qkv.weight
    return f"fp8 e4m3, {weight.mode}" + (", transposed copy kept" if weight.w8_t is not None else "")


def _patch(inner: nn.Module, layers: Sequence[nn.Module], fast: list[FastLayer], ops: ModuleType) -> None:
    inner.fast_layers = fast  # type: ignore[assignment]
    groups = [g for f in fast for g in f.groups]
    inner.register_forward_pre_hook(lambda *_: refresh(groups))
    by_layer = iter(fast)
    for layer in layers:
        if type(layer).__name__ in FUSED_CLASSES:
            _patch_layer(layer, next(by_layer))
    norm: Any = inner.norm
    plain = norm.forward
    if not norm.weight.requires_grad and hasattr(norm, "variance_epsilon"):
        norm.forward = lambda x: (
            frozen_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon, ops).view_as(x) if x.requires_grad else plain(x)
        )


def _patch_layer(layer: nn.Module, fast: FastLayer) -> None:
    plain = layer.forward

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        cu = kwargs.get("cu_seq_lens_q")
        if cu is None or past_key_values is not None or hidden_states.shape[0] != 1:
            return plain(hidden_states, *args, position_embeddings=position_embeddings, past_key_values=past_key_values, **kwargs)
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        packed = Packed(cos, sin, cu, int(kwargs["max_length_q"]))
        return run_layer(fast, hidden_states[0].contiguous(), packed)[None]

    layer.forward = forward  # type: ignore[method-assign, assignment]


@torch.no_grad()
def _self_test(fast: FastLayer, tokens: int = 160) -> float:
    """Largest relative error of the fused layer against its eager twin on this GPU: output, d(input), every adapter gradient.

    Uses the layer's own weights and random adapters in the buffers (``refresh`` puts the true ones back)."""
    weight = fast.qkv.weight
    device, dtype = fast.norm1.device, fast.norm1.dtype
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    for group in fast.groups:
        if group.a is not None and group.b is not None:
            group.a.copy_(random(*group.a.shape) * group.a.shape[1] ** -0.5)
            group.b.copy_(random(*group.b.shape) * 0.02)
    h, dh = random(tokens, weight.shape[1]), random(tokens, weight.shape[1])
    angle = torch.rand(tokens, fast.head_dim // 2, device=device, generator=generator).repeat(1, 2) * 6
    cu = torch.tensor([0, 50, 53, tokens], dtype=torch.int32, device=device)
    packed = Packed(angle.cos().to(dtype), angle.sin().to(dtype), cu, tokens - 53)
    results = []
    own = fast.ops
    for ops in (own, eager):
        fast.ops = ops
        y, kept = fast.forward(h, packed)
        dx, grads = fast.backward(dh, h, packed, kept, first=False)
        results.append([y, dx, *grads])
    fast.ops = own
    errors = [float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6)) for a, b in zip(*results, strict=True) if b is not None]  # type: ignore[union-attr]
    return max(errors) if all(e == e for e in errors) else float("inf")
