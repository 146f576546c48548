"""The fast path: a loaded transformers model (with PEFT's adapters, if any) keeps its classes and
parameters, and its decoder layers compute by ``trainer/kernels/decoder_layer.py``. What does not
fit the fast layer keeps transformers' forward, and the returned names say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels import reference
from trainer.kernels.attention import name as attention_name
from trainer.kernels.backend import distrust, operations
from trainer.kernels.decoder_layer import FastLayer, Packed, frozen_norm, run_layer
from trainer.kernels.frozen import FrozenWeight, freeze_weight
from trainer.kernels.lora import Group, base_linear, frozen_linear, refresh
from trainer.kernels.verify import (
    OTHERWISE,
    TOLERANCE,
    compile_ahead,
    layer_error,
    trust_short_attention,
)

log = logging.getLogger(__name__)

FUSED_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
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
    """Move ``model`` to ``device`` layer by layer, freeze the base in ``precision`` ("fp32",
    "bf16", "fp8", "nf4") and patch in the fast path. Returns what runs, by name, for the log and
    the manifest.

    Load the model on the CPU for fp8 and nf4: no more than one layer is then on the device
    unquantised. The first ``checkpoint_layers`` layers keep only their input. ``keep_transpose``:
    see ``freeze_weight``. ``materialise`` is called on each part of a model built on the meta
    device and must give it values there. Trainable base weights (full fine-tuning) are refused: the
    fast path has no gradient for them. Not safe to call twice."""
    device = torch.device(device)
    inner = inner_model(model)
    layers: Sequence[nn.Module] = inner.layers  # type: ignore[assignment]
    ops = operations(device)
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
    if fast and ops is not reference:
        compile_ahead(fast[0])
    short = bool(fast) and ops is not reference and trust_short_attention(fast[0])
    names = {"base": _base_name(fast, precision), "attention": attention_name(short, device)}
    error = layer_error(fast[0]) if fast and ops is not reference else 0.0
    tolerance = TOLERANCE.get(precision, OTHERWISE)
    if fast and error < tolerance:
        _patch(inner, layers, fast, ops)
        names["layer"] = f"fused, {len(fast)} of {len(layers)}" + (
            ", eager twin" if ops is reference else f", self-test {error:.4f}"
        )
        names["checkpointed_layers"] = f"{sum(f.checkpoint for f in fast)} of {len(layers)}"
    else:
        if fast:
            distrust(f"the fused layer's self-test is off by {error:.4f}")
        names["layer"] = (
            f"transformers: self-test error {error:.4f}, at most {tolerance}"
            if fast
            else "transformers"
        )
    if reasons:
        names["not_fused"] = f"{len(reasons)} layers: {reasons[0]}"
    names["loss"] = "chunked, frozen head" + ("" if operations(device) is reference else ", Triton")
    return names


def inner_model(model: nn.Module) -> nn.Module:
    """The part that has ``layers``: LlamaModel inside PeftModel inside anything."""
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers named 'layers': run it "
        "without the fast path"
    )


def _place(
    module: nn.Module,
    device: torch.device,
    materialise: Materialise | None,
    skip: set[int] | None = None,
) -> None:
    """Move a module's tensors, leaf by leaf, without those of ``skip``; meta tensors become empty
    ones that ``materialise`` fills."""
    for leaf in module.modules():
        own = list(leaf.parameters(recurse=False)) + list(leaf.buffers(recurse=False))
        if not own or (skip and any(id(t) in skip for t in own)):
            continue
        if any(t.is_meta for t in own):
            if materialise is None:
                raise ValueError(
                    f"{type(leaf).__name__} is on the meta device and nothing was given to fill it"
                )
            leaf.to_empty(device=device, recurse=False)
            materialise(leaf)
        else:
            leaf._apply(lambda t: t.to(device), recurse=False)


def build_layer(
    layer: nn.Module, precision: str, ops: ModuleType, checkpoint: bool, keep_transpose: bool
) -> FastLayer:
    """The fast form of one decoder layer. Raises ValueError with the reason, and leaves the layer
    as it was, where it does not fit."""
    name = type(layer).__name__
    if name not in FUSED_CLASSES:
        raise ValueError(f"{name} is not of a kind that the fused layer knows")
    attn: Any = layer.self_attn
    mlp: Any = layer.mlp
    config = attn.config
    groups = [
        [attn.q_proj, attn.k_proj, attn.v_proj],
        [attn.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    linears = [base_linear(m) for group in groups for m in group]
    _validate_fits(layer, linears, config)
    dtype = linears[0].weight.dtype
    first = linears[0].bias
    bias = torch.cat([x.bias.data for x in linears[:3]]) if first is not None else None
    options = _options(precision, keep_transpose)
    built = [Group.of(g, precision, dtype, **options) for g in groups]
    for group, modules in zip(built, groups, strict=True):
        _route(group.weight, [base_linear(m) for m in modules], precision)
    norm1: Any = layer.input_layernorm
    norm2: Any = layer.post_attention_layernorm
    qkv, o, gate_up, down = built
    return FastLayer(
        ops=ops,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        norm1=norm1.weight.data,
        norm2=norm2.weight.data,
        bias=bias,
        eps1=norm1.variance_epsilon,
        eps2=norm2.variance_epsilon,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attn.head_dim,
        scale=attn.scaling,
        checkpoint=checkpoint,
    )


def _validate_fits(layer: nn.Module, linears: list[nn.Linear], config: Any) -> None:
    from trainer.kernels.lora import adapter_of, padded_rank

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
        p.requires_grad
        for n in ("input_layernorm", "post_attention_layernorm")
        for p in getattr(layer, n).parameters()
    ):
        raise ValueError("base weights train")
    attn: Any = layer.self_attn
    head_dim = attn.head_dim
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
        forward = partial(frozen_linear, weight=part, bias=linear.bias)
        linear.forward = forward  # type: ignore[method-assign]
        start += linear.out_features


def _freeze_linears(layer: nn.Module, precision: str, keep_transpose: bool) -> None:
    """The fall-back of one layer: transformers' forward over quantised linears; bf16 stays as it
    is."""
    if precision in ("bf16", "fp32"):
        return
    for module in layer.modules():
        variants: Any = getattr(module, "use_dora", {})
        if variants and any(variants.values()):
            raise ValueError(
                f"DoRA reads the base weight, which {precision} replaces: use precision "
                "bf16, or use_dora false"
            )
    for name, module in layer.named_modules():
        if type(module) is nn.Linear and "lora_" not in name and not module.weight.requires_grad:
            weight = freeze_weight(
                module.weight.data, precision, **_options(precision, keep_transpose)
            )
            _route(weight, [module], precision)
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _base_name(fast: list[FastLayer], precision: str) -> str:
    if precision != "fp8" or not fast:
        return precision
    weight: Any = fast[0].qkv.weight
    return f"fp8 e4m3, {weight.mode}" + (
        ", transposed copy kept" if weight.w8_t is not None else ""
    )


def _patch(
    inner: nn.Module, layers: Sequence[nn.Module], fast: list[FastLayer], ops: ModuleType
) -> None:
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
            frozen_norm(
                x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon, ops
            ).view_as(x)
            if x.requires_grad
            else plain(x)
        )


def _patch_layer(layer: nn.Module, fast: FastLayer) -> None:
    plain = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cu = kwargs.get("cu_seq_lens_q")
        # since 5.24 the latter
        cached = [kwargs.get(name) for name in ("past_key_values", "cache")]
        if cu is None or any(c is not None for c in cached) or hidden_states.shape[0] != 1:
            return plain(hidden_states, *args, **kwargs)
        position_embeddings = kwargs["position_embeddings"]
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        packed = Packed(cos, sin, cu, int(kwargs["max_length_q"]))
        # [0] would cost a zeroed copy in backward
        return run_layer(fast, hidden_states.squeeze(0).contiguous(), packed).unsqueeze(0)

    layer.forward = forward
    layer.is_fused = True  # type: ignore[assignment]
