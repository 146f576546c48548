"""Finds the modules of a transformers decoder layer that the fused layer is built from, by its
family's row in ``trainer/families.toml``, or says why the layer cannot be fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from trainer import families
from trainer.families import Family
from trainer.kernels.attention import Rules
from trainer.kernels.lora import adapter_of, base_linear, padded_rank
from trainer.kernels.nets import ColumnOrder, Net
from trainer.kernels.norms import HeadNorms, Norm

WIDEST = 512  # the largest head that the kernels take; flash attention takes 256


@dataclass(frozen=True)
class Parts:
    """Modules of one decoder layer: linears grouped by their shared input, norms in the order of
    the stream."""

    family: Family
    attention: Any
    qkv: list[nn.Module]
    o: nn.Module
    gate_up: list[nn.Module]  # empty where experts are in the MLP's place
    down: nn.Module | None
    norm1: nn.Module
    norm2: nn.Module
    branch1: nn.Module | None
    branch2: nn.Module | None
    heads: int
    kv_heads: int
    head_dim: int
    net: Net | None = None  # in attention's place

    @property
    def gated(self) -> bool:
        """Whether each query head has a gate of attention's output beside it."""
        return self.net is None and bool(self.family.row["gate"])

    @property
    def linears(self) -> list[list[nn.Module]]:
        attention = [self.qkv, [self.o]]
        return attention if self.down is None else [*attention, self.gate_up, [self.down]]

    @property
    def norms(self) -> list[nn.Module]:
        every = (self.norm1, self.norm2, self.branch1, self.branch2, *self._of_heads)
        return [n for n in every if n is not None]

    @property
    def _of_heads(self) -> tuple[nn.Module, ...]:
        if self.family.row["qk_norm"] != "head" or self.net is not None:
            return ()
        return (self.attention.q_norm, self.attention.k_norm)

    @property
    def sizes(self) -> list[list[int]]:
        """Output features of q, k, v; o; gate, up; down."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        joined = [2 * wide if self.gated else wide, narrow, narrow]
        if self.net is not None:
            joined = self.net.sizes
        sizes = [joined, [base_linear(self.o).out_features]]
        if self.down is None:
            return sizes
        down = base_linear(self.down)
        return [*sizes, [down.in_features] * 2, [down.out_features]]

    @property
    def rules(self) -> Rules:
        """Attention's rules. The config has the window where one window serves the whole model."""
        if self.net is not None:
            return Rules(self.head_dim**-0.5)
        window = getattr(self.attention, "sliding_window", None)
        if window is None and self.family.row["windows"] == "all":
            window = self.family.window
        return Rules(self.attention.scaling, window, self.family.softcap)

    @property
    def sinks(self) -> Tensor | None:
        return self.attention.sinks if self.family.sinks else None

    def norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else read_norm(module, self.family)

    @property
    def head_norms(self) -> HeadNorms | None:
        if not self._of_heads:
            return None
        (q, eps), (k, _) = (read_norm(n, self.family) for n in self._of_heads)
        if (order := self.order) is not None:
            q, k = q[order.turned], k[order.turned]
        weights = torch.stack([q.float(), k.float(), torch.ones_like(q, dtype=torch.float32)])
        return HeadNorms(weights, eps, hasattr(self.attention, "v_norm"))

    @property
    def order(self) -> ColumnOrder | None:
        if not self.gated:
            return None
        like = base_linear(self.o).weight
        return ColumnOrder.of(self.heads, self.kv_heads, self.head_dim, self.family.turned, like)


def read_norm(module: nn.Module, family: Family) -> Norm:
    """Weight and eps of an RMSNorm of transformers."""
    told: Any = module
    weight = cast(Tensor, told.weight.data)
    eps = told.variance_epsilon if hasattr(told, "variance_epsilon") else told.eps
    return Norm(weight.float() + 1.0 if family.row["one_more"] else weight, float(eps))


def find_parts(layer: nn.Module, config: Any = None) -> Parts:
    """The parts of a decoder layer. ``config``: the model's, for layers without attention. Raises
    ValueError with the reason why the layer cannot be fused."""
    attn: Any = getattr(layer, "self_attn", None) or getattr(layer, "linear_attn", None)
    name = type(layer).__name__
    config = getattr(attn, "config", None) or config
    if config is None:
        raise ValueError(f"{name} is not of a kind that the fused layer knows")
    family = families.read(config.to_dict())
    if not family.fused:
        raise ValueError(f"{name} is not of a kind that the fused layer knows")
    told: Any = layer
    mlp, sparse = told.mlp, hasattr(told.mlp, "experts")
    before, after = norm_names(told, family)
    norms = [getattr(layer, n) for n in before]
    branches: list[Any] = [getattr(layer, n) for n in after] or [None, None]
    validate_plain(told)
    net = read_net(attn) if hasattr(attn, "in_proj_qkv") else None
    qkv = projections(attn)
    parts = Parts(
        family=family,
        attention=attn,
        qkv=qkv,
        o=attn.o_proj if net is None else attn.out_proj,
        gate_up=[] if sparse else gate_and_up(mlp),
        down=None if sparse else mlp.down_proj,
        norm1=norms[0],
        norm2=norms[1],
        branch1=branches[0],
        branch2=branches[1],
        heads=config.num_attention_heads if net is None else net.values,
        kv_heads=count_kv_heads(qkv, attn, config) if net is None else net.keys,
        head_dim=attn.head_dim if net is None else net.head_dim,
        net=net,
    )
    if not sparse:
        validate_activation(getattr(mlp, "act_fn", None) or mlp.activation_fn, family)
    validate(layer, parts)
    return parts


def read_net(module: Any) -> Net:
    """The parameters of a gated delta net. Raises ValueError where the kernels do not support
    it."""
    if module.head_k_dim != module.head_v_dim:
        raise ValueError(f"heads of {module.head_k_dim} and {module.head_v_dim} columns")
    if module.num_v_heads % module.num_k_heads:
        raise ValueError(f"{module.num_v_heads} value heads of {module.num_k_heads} key heads")
    own = (module.conv1d.weight, module.A_log, module.dt_bias, module.norm.weight)
    if any(p.requires_grad for p in own) or module.conv1d.bias is not None:
        raise ValueError("a part of the delta net trains, or its convolution has a bias")
    taps, rate, shift, weight = (p.data for p in own)
    return Net(
        taps=taps[:, 0].contiguous(),
        rate=rate.float().exp(),
        shift=shift.float(),
        weight=weight,
        eps=float(module.norm.variance_epsilon),
        keys=module.num_k_heads,
        values=module.num_v_heads,
        head_dim=module.head_v_dim,
    )


def projections(attn: Any) -> list[nn.Module]:
    """q, k and v, or one linear that is all three. Where values are computed from the keys'
    projection, that linear is listed for both, with its adapter."""
    if hasattr(attn, "in_proj_qkv"):
        return [attn.in_proj_qkv, attn.in_proj_z, attn.in_proj_b, attn.in_proj_a]
    if hasattr(attn, "qkv_proj"):
        return [attn.qkv_proj]
    return [attn.q_proj, attn.k_proj, attn.v_proj if attn.v_proj is not None else attn.k_proj]


def count_kv_heads(qkv: list[nn.Module], attn: Any, config: Any) -> int:
    """Number of key heads of this layer; it differs between layers in Gemma 4."""
    if len(qkv) == 1:
        return int(config.num_key_value_heads)
    return base_linear(qkv[1]).out_features // int(attn.head_dim)


def validate_plain(layer: Any) -> None:
    """Raises ValueError for additions that some Gemma 4 models make to a layer."""
    attn: Any = getattr(layer, "self_attn", None)
    # transformers 5.24 marks layers as sharing keys and values even where no layer reads them
    shared = getattr(getattr(attn, "config", None), "num_kv_shared_layers", 0)
    if shared and (attn.is_kv_shared_layer or attn.store_full_length_kv):
        raise ValueError("layers share keys and values")
    if getattr(layer, "hidden_size_per_layer_input", 0):
        raise ValueError("the layer has an input of its own")
    if getattr(layer, "enable_moe_block", False):
        raise ValueError("experts stand beside an MLP")


def gate_and_up(mlp: Any) -> list[nn.Module]:
    """Two linears, or one that is both."""
    return [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]


def norm_names(layer: nn.Module, family: Family) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the norms before attention and the MLP, names of the norms on their outputs)."""
    if family.row["norms"] == "before":
        return ("input_layernorm", "post_attention_layernorm"), ()
    if hasattr(layer, "pre_feedforward_layernorm"):
        return ("input_layernorm", "pre_feedforward_layernorm"), (
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        )
    return ("input_layernorm", "post_attention_layernorm"), (
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    )


def validate_activation(activation: Any, family: Family) -> None:
    """Raises ValueError where the activation is not that of the family's row. For layers without
    experts."""
    x = torch.linspace(-4, 4, 9)
    wanted = gelu(x, approximate="tanh") if is_gelu(family) else silu(x)
    if not torch.allclose(activation(x), wanted, atol=1e-6):
        raise ValueError(f"its activation is not what its row says: {family.row['mlp']}")


def validate(layer: nn.Module, parts: Parts) -> None:
    """Raises ValueError for a layer that the fused layer does not support."""
    linears = [[base_linear(m) for m in group] for group in parts.linears]
    _validate_linears(parts, [x for group in linears for x in group])
    biased = [x.bias is not None for x in linears[0]]
    if any(x.bias is not None for group in linears[2:] for x in group) or len(set(biased)) != 1:
        raise ValueError("the MLP has a bias, or one of q, k, v has none")
    head_dim = parts.head_dim
    if head_dim > 256 and parts.head_norms is None:
        raise ValueError(f"heads of {head_dim} columns have no norms")
    if head_dim & (head_dim - 1) or not 32 <= head_dim <= WIDEST:
        raise ValueError(f"head size {head_dim} is not a power of two from 32 to {WIDEST}")
    if not getattr(parts.attention, "is_causal", True):
        raise ValueError("attention sees later tokens")
    if any(isinstance(m, nn.Dropout) and m.p for m in layer.children()):
        raise ValueError("a branch has dropout")
    found = [adapter_of(m) for group in parts.linears for m in group]
    ranks = [a[0].shape[0] for a in found if a]
    if ranks and padded_rank(max(ranks)) > 64:
        raise ValueError(f"rank {max(ranks)} is above 64")


def _validate_linears(parts: Parts, linears: list[nn.Linear]) -> None:
    if any(type(x) is not nn.Linear for x in linears):
        raise ValueError("a linear is of a special class")
    trained = any(p.requires_grad for n in parts.norms for p in n.parameters())
    trained = trained or bool(parts.sinks is not None and parts.sinks.requires_grad)
    if trained or any(x.weight.requires_grad for x in linears):
        raise ValueError("base weights train")


def is_gelu(family: Family) -> bool:
    return bool(family.row["mlp"] == "geglu")


def wide_angles(
    cos: Tensor, sin: Tensor, head_dim: int, turned: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [M, n], each angle once or twice -> [M, D] with equal halves. Only the part
    ``turned`` of a head's columns rotates; the other columns get angle zero."""
    if cos.shape[1] == head_dim:
        return cos.contiguous(), sin.contiguous()
    angles = int(head_dim * turned) // 2
    rest = (0, head_dim // 2 - angles)
    c = nn.functional.pad(cos[:, :angles], rest, value=1.0)
    n = nn.functional.pad(sin[:, :angles], rest)
    return torch.cat([c, c], 1), torch.cat([n, n], 1)
