"""The fast path: a loaded transformers model (with PEFT's adapters, if any) keeps its classes and
parameters, and its decoder layers compute by ``trainer/kernels/decoder_layer.py``. Layers that
the fast layer does not support keep transformers' forward; the returned names say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer import families
from trainer.kernels import delta, reference
from trainer.kernels.attention import KeyEnds
from trainer.kernels.attention import name as attention_name
from trainer.kernels.backend import distrust, operations
from trainer.kernels.base_parts import BaseParts
from trainer.kernels.decoder_layer import FastLayer, Packed, frozen_norm, run_layer
from trainer.kernels.delta_layer import DeltaLayer
from trainer.kernels.experts import NAME as EXPERTS
from trainer.kernels.experts import lean
from trainer.kernels.experts import quantise as quantise_experts
from trainer.kernels.frozen import FrozenWeight, freeze_weight
from trainer.kernels.lora import Group, base_linear, frozen_linear, refresh
from trainer.kernels.norms import Norm
from trainer.kernels.parts import (
    Parts,
    find_parts,
    is_gelu,
    read_norm,
    validate_activation,
    wide_angles,
)
from trainer.kernels.shared_mlp import SharedMlp
from trainer.kernels.step_layer import step
from trainer.kernels.verify import (
    OTHERWISE,
    STOCK_TOLERANCE,
    TOLERANCE,
    compile_ahead,
    layer_error,
    stock_error,
    trust_short_attention,
)

log = logging.getLogger(__name__)

Materialise = Callable[[nn.Module], None]


def accelerate_model(
    model: nn.Module,
    precision: str,
    device: torch.device | str,
    *,
    checkpoint_layers: int = 0,
    keep_transpose: bool = False,
    materialise: Materialise | None = None,
    parts: BaseParts | None = None,
) -> dict[str, str]:
    """Move ``model`` to ``device`` layer by layer, freeze the base in ``precision`` ("fp32",
    "bf16", "fp8", "nf4") and patch in the fast path. Returns what runs, by name, for the log and
    the manifest.

    Load the model on the CPU for fp8 and nf4: no more than one unquantised layer is then on the
    device. The first ``checkpoint_layers`` layers save only their input. ``keep_transpose``: see
    ``freeze_weight``. ``materialise`` is called on each part of a model built on the meta device
    and must load its values there. With ``parts`` process 0 has the values, the model may be on the
    meta device on the others, and the layers come out cut: attach them. Base weights that train
    (full fine-tuning) are refused: the fast path has no gradient for them. Call it once."""
    device = torch.device(device)
    inner = inner_model(model)
    layers: Sequence[nn.Module] = inner.layers  # type: ignore[assignment]
    ops = operations(device)
    of_layers = {id(p) for layer in layers for p in layer.parameters()}
    _place(model, device, materialise, parts, skip=of_layers)
    fast: list[FastLayer | None] = []
    reasons: list[str] = []
    tested: dict[Any, int] = {}  # the first layer of each kind, which stays whole for the test
    for i, layer in enumerate(layers):
        _place(layer, device, materialise, parts)
        quantise_experts(layer, precision)
        try:
            again, config = i < checkpoint_layers, getattr(inner, "config", None)
            fast.append(build_layer(layer, precision, ops, again, keep_transpose, config))
        except ValueError as why:
            fast.append(None)
            reasons.append(str(why))
            _freeze_linears(layer, precision, keep_transpose)
        one = fast[i]
        if parts is not None and (one is None or tested.setdefault(one.kind, i) != i):
            parts.cut(layer, one)
    built = [f for f in fast if f is not None]
    names = {"base": _base_name(built, precision), "layer": "transformers"}
    names["attention"] = attention_name(False, device)
    if built:
        pairs = [(layer, f) for layer, f in zip(layers, fast, strict=True) if f is not None]
        names |= _trust(one_of_each_kind(pairs), precision, device)
        if names["layer"] == "fused":
            _patch(inner, layers, fast, ops)
            names["layer"] = f"fused, {len(built)} of {len(layers)}{names.pop('test')}"
            names["checkpointed_layers"] = f"{sum(f.checkpoint for f in built)} of {len(layers)}"
    if parts is not None:
        for i in tested.values():
            parts.cut(layers[i], fast[i])
    if reasons:
        names["not_fused"] = f"{len(reasons)} layers: {reasons[0]}"
    names["loss"] = "chunked, frozen head" + ("" if operations(device) is reference else ", Triton")
    return names


def hold_frozen(
    model: nn.Module, layers: nn.ModuleList, precision: str, device: torch.device
) -> int:
    """Move ``model`` to ``device`` decoder layer by decoder layer, its frozen linears and experts
    held in ``precision`` ("fp8", "nf4"); transformers' layers go on computing, and what trains
    stays as it is. Returns the number of layers whose experts are held. Raises ValueError for what
    the precision does not serve."""
    of_layers = {id(p) for layer in layers for p in layer.parameters()}
    _place(model, device, None, None, skip=of_layers)
    held = 0
    for layer in layers:
        _place(layer, device, None, None)
        held += quantise_experts(layer, precision)
        _freeze_linears(layer, precision, keep_transpose=False)
    return held


def one_of_each_kind(
    pairs: Sequence[tuple[nn.Module, FastLayer]],
) -> list[tuple[nn.Module, FastLayer]]:
    """The first layer of each kind, beside its fast form."""
    first: dict[Any, tuple[nn.Module, FastLayer]] = {}
    for layer, fast in pairs:
        first.setdefault(fast.kind, (layer, fast))
    return list(first.values())


def _trust(
    pairs: Sequence[tuple[nn.Module, FastLayer]], precision: str, device: torch.device
) -> dict[str, str]:
    """Compare each kind of layer with its twin and with the layer of transformers that it replaces.
    Returns what will run, by name: "layer" is "fused" or the reason why not, "test" the errors
    found."""
    ops, tolerance = pairs[0][1].ops, TOLERANCE.get(precision, OTHERWISE)
    if ops is reference:
        return {
            "layer": "fused",
            "test": ", eager twin",
            "attention": attention_name(False, device),
        }
    compile_ahead([f for _, f in pairs])
    attending = [f for _, f in pairs if f.attends]
    short = bool(attending) and all([trust_short_attention(f) for f in attending])
    names = {"attention": attention_name(short, device)}
    error = max(layer_error(f) for _, f in pairs)
    if not error < tolerance:
        distrust(f"the fused layer's self-test is off by {error:.4f}")
        return names | {"layer": f"transformers: self-test error {error:.4f}, at most {tolerance}"}
    if not short and any(f.rules.softcap is not None or f.head_dim > 256 for f in attending):
        return names | {"layer": "transformers: flash attention takes no cap and no head over 256"}
    stock = max(stock_error(layer, f) for layer, f in pairs)
    if not stock < STOCK_TOLERANCE.get(precision, OTHERWISE):
        log.warning("the fused layer differs from transformers' by %.4f: not used", stock)
        return names | {"layer": f"transformers: the fused layer differs by {stock:.4f}"}
    said = f", self-test {error:.4f}, from transformers {stock:.4f}"
    return names | {"layer": "fused", "test": said}


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
    parts: BaseParts | None,
    skip: set[int] | None = None,
) -> None:
    """Move a module's tensors, leaf by leaf, without those of ``skip``; meta tensors become empty
    ones that ``materialise`` fills, or process 0 by ``parts``."""
    for leaf in module.modules():
        own = list(leaf.parameters(recurse=False)) + list(leaf.buffers(recurse=False))
        if not own or (skip and any(id(t) in skip for t in own)):
            continue
        if any(t.is_meta for t in own):
            if materialise is None and parts is None:
                raise ValueError(
                    f"{type(leaf).__name__} is on the meta device and nothing was given to fill it"
                )
            leaf.to_empty(device=device, recurse=False)
            if materialise is not None:
                materialise(leaf)
        else:
            leaf._apply(lambda t: t.to(device), recurse=False)
        if parts is not None:
            parts.share(leaf)


def build_layer(
    layer: nn.Module,
    precision: str,
    ops: ModuleType,
    checkpoint: bool,
    keep_transpose: bool,
    config: Any = None,
) -> FastLayer:
    """The fast form of one decoder layer, of a model of this ``config``. Raises ValueError with the
    reason, and leaves the layer as it was, where it does not fit."""
    parts = find_parts(layer, config)
    if parts.family.row["delta"] and ops is not reference:  # with it rows come one by one
        if why := delta.why_not(base_linear(parts.o).weight.device):
            raise ValueError(why)
    norm1, norm2 = read_norm(parts.norm1, parts.family), read_norm(parts.norm2, parts.family)
    linears = [base_linear(m) for m in parts.qkv]
    dtype, biased = linears[0].weight.dtype, linears[0].bias is not None
    bias = torch.cat([x.bias.data for x in linears]) if biased else None
    options = _options(precision, keep_transpose)
    built = [
        Group.of(g, precision, dtype, sizes if len(g) < len(sizes) else None, **options)
        for g, sizes in zip(parts.linears, parts.sizes, strict=True)
    ]
    for group, modules in zip(built, parts.linears, strict=True):
        _route(group.weight, [base_linear(m) for m in modules], precision)
    qkv, o, gate_up, down = (*built, None, None)[:4]
    assert qkv is not None and o is not None
    beside = None
    if hasattr(layer.mlp, "shared_expert"):
        beside = _share(layer.mlp.shared_expert, parts, precision, ops, options)
    kind = FastLayer if parts.net is None else partial(DeltaLayer, net=parts.net)
    return kind(
        ops=ops,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        norm1=norm1,
        norm2=norm2,
        bias=bias,
        o_bias=_bias(base_linear(parts.o)),
        sinks=None if parts.sinks is None else parts.sinks.data,
        turned=parts.family.turned,
        beside=beside,
        after=partial(_experts, layer, norm2, ops) if down is None else None,
        remake_after=down is None and not keeps_little(base_experts(layer)),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        rules=parts.rules,
        checkpoint=checkpoint,
        head_norms=parts.head_norms,
        branch1=parts.norm(parts.branch1),
        branch2=parts.norm(parts.branch2),
        pairs=parts.family.row["rotary"] == "pairs",
        order=parts.order,
        gelu=is_gelu(parts.family),
        out_scale=float(getattr(layer, "layer_scalar", 1.0)),
    )


def _share(
    module: Any, parts: Parts, precision: str, ops: ModuleType, options: dict[str, bool]
) -> SharedMlp:
    """The fast form of the shared expert."""
    validate_activation(module.act_fn, parts.family)
    groups = []
    for linears in ([module.gate_proj, module.up_proj], [module.down_proj]):
        bases = [base_linear(m) for m in linears]
        if any(x.bias is not None or x.weight.requires_grad for x in bases):
            raise ValueError("the shared expert has a bias, or its weights train")
        groups.append(Group.of(linears, precision, bases[0].weight.dtype, None, **options))
        _route(groups[-1].weight, bases, precision)
    return SharedMlp(ops, *groups)


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data


def base_experts(layer: Any) -> Any:
    """The experts of a layer inside PEFT's wrappers."""
    held = layer.mlp.experts
    return held.get_base_layer() if hasattr(held, "get_base_layer") else held


def keeps_little(experts: Any) -> bool:
    """Whether what these experts keep for backward need not be made again: the trainer's own
    function computes them, which keeps little. With transposed weights (gpt-oss) it is made again,
    as the plan counts it."""
    if experts.is_transposed or not lean(experts):
        return False
    return getattr(experts.config, "_experts_implementation", "") == EXPERTS


def _experts(layer: Any, norm: Norm, ops: ModuleType, middle: Tensor) -> Tensor:
    """The second half of a layer with experts. [M, h] -> [M, h]."""
    y = layer.mlp(frozen_norm(middle, *norm, ops)[None])
    added: Tensor = (y[0] if isinstance(y, tuple) else y)[0]
    return middle + added


def _options(precision: str, keep_transpose: bool) -> dict[str, bool]:
    return {"keep_transpose": keep_transpose} if precision == "fp8" else {}


def _route(weight: FrozenWeight, linears: list[nn.Linear], precision: str) -> None:
    """Give quantised linears their own forward, for calls that are not packed (generation)."""
    if precision in ("bf16", "fp32"):
        return
    start = 0
    for linear in linears:
        part = weight.rows(start, start + linear.out_features)
        forward = partial(frozen_linear, weight=part, bias=linear.bias)
        linear.forward = forward  # type: ignore[method-assign]
        start += linear.out_features


def _freeze_linears(layer: nn.Module, precision: str, keep_transpose: bool) -> None:
    """Fall-back of one layer: transformers' forward over quantised linears; bf16 is left as it
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
    inner: Any, layers: Sequence[nn.Module], fast: list[FastLayer | None], ops: ModuleType
) -> None:
    """``fast``: the fast form of each layer, or None."""
    inner.fast_layers = [f for f in fast if f is not None]
    shared = [f.beside for f in inner.fast_layers if f.beside is not None]
    groups = [g for part in (*inner.fast_layers, *shared) for g in part.groups]

    def look_up(_module: nn.Module, _given: tuple[Any, ...], more: dict[str, Any]) -> None:
        if not getattr(_kept(more), "steady", False):
            inner.looked_up = None
            refresh(groups)

    inner.register_forward_pre_hook(look_up, with_kwargs=True)
    for layer, one in zip(layers, fast, strict=True):
        if one is not None:
            _patch_layer(layer, one)
    norm: Any = inner.norm
    if not norm.weight.requires_grad:
        weight, eps = read_norm(norm, families.read(inner.config.to_dict()))
        # the same with and without gradients: the log-probs of reference and policy must agree
        norm.forward = lambda x: frozen_norm(x.reshape(-1, x.shape[-1]), weight, eps, ops).view_as(
            x
        )


def _patch_layer(layer: Any, fast: FastLayer) -> None:
    attention: Any = getattr(layer, "self_attn", None)
    plain = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cu, kept = kwargs.get("cu_seq_lens_q"), _kept(kwargs)
        ours = kept is None or hasattr(kept, "place")
        if cu is None and kept is not None and ours and kept.place is not None and fast.steps:
            cos, sin = (x[:, 0] for x in kwargs["position_embeddings"])
            angles = wide_angles(cos, sin, fast.head_dim, fast.turned)
            held = kept.of(attention.layer_idx)
            return step(fast, hidden_states[:, 0], *angles, kept.place, held)[:, None]
        if cu is None or not ours or hidden_states.shape[0] != 1:
            return plain(hidden_states, *args, **kwargs)
        position_embeddings = kwargs["position_embeddings"]
        cos, sin = wide_angles(
            position_embeddings[0][0], position_embeddings[1][0], fast.head_dim, fast.turned
        )
        keep = None if kept is None else partial(kept.put, attention.layer_idx)
        packed = Packed(cos, sin, cu, int(kwargs["max_length_q"]), keep)
        if (shared := kwargs.get("shared_keys")) is not None:
            ends = KeyEnds(kwargs["cu_seq_lens_k"], int(kwargs["max_length_k"]))
            packed = packed._replace(shared=shared, ends=ends)
        # [0] would cost a zeroed copy in backward
        return run_layer(fast, hidden_states.squeeze(0).contiguous(), packed).unsqueeze(0)

    if fast.beside is not None:
        layer.mlp.shared_expert.forward = fast.beside.__call__
    layer.forward = forward
    layer.is_fused = True


def _kept(given: dict[str, Any]) -> Any:
    """The keys and values of earlier tokens among a layer's arguments, or None."""
    names = ("past_key_values", "cache")  # since 5.24 the latter
    return next((given[n] for n in names if given.get(n) is not None), None)
