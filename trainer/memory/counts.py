"""How many weights a decoder of a shape has: in all, in one token's products, in its adapter."""

from __future__ import annotations

from trainer import families
from trainer.families import EXPERT_RANK
from trainer.memory.shape import EMBEDDINGS, MLP_NAMES, Shape, Targets


def linear_parameters(shape: Shape) -> int:
    """Weights of all layers' linear modules and experts, without biases."""
    return outside_experts(shape) + expert_parameters(shape)


def active_parameters(shape: Shape) -> int:
    """Weights that one token meets in matrix products, the head's apart: of a mixture the experts
    that it is sent to."""
    return outside_experts(shape) + active_in_experts(shape)


def active_in_experts(shape: Shape) -> int:
    """The experts' part of `active_parameters`."""
    m = shape.mixture
    return 0 if m is None else expert_parameters(shape) * m.active // m.experts


def outside_experts(shape: Shape) -> int:
    sizes = shape.linears()
    if shape.mixture is None:
        return sum(shape.count(n) * i * o for n, (i, o) in sizes.items())
    m, h = shape.mixture, shape.hidden
    mlp = {n for n in sizes if n in MLP_NAMES}
    attention = sum(shape.count(n) * i * o for n, (i, o) in sizes.items() if n not in mlp)
    dense = sum(i * o for n, (i, o) in sizes.items() if n in mlp)
    shared = 3 * h * m.shared + h * m.experts  # and the router
    if shape.delta is not None and m.shared:
        shared += h  # and the gate of the shared expert
    return attention + m.dense_layers * dense + (shape.layers - m.dense_layers) * shared


def sparse_layers(shape: Shape) -> int:
    """The number of layers with experts."""
    return 0 if shape.mixture is None else shape.layers - shape.mixture.dense_layers


def expert_parameters(shape: Shape) -> int:
    """Weights of all experts of all layers."""
    m = shape.mixture
    return 0 if m is None else (shape.layers - m.dense_layers) * m.weights(shape.hidden)


def parameters(shape: Shape) -> int:
    """All parameters of the base model, as `model.num_parameters()` counts them (a tied head
    once)."""
    embeddings = (shape.vocab * (1 if shape.tied else 2) + shape.positions) * shape.hidden
    norms = (shape.norms * shape.layers + 1) * shape.hidden * (2 if shape.other_bias else 1)
    norms += shape.attending * 2 * shape.head_dim if shape.qk_norm else 0
    norms += 0 if shape.delta is None else shape.delta.layers * shape.delta.others
    biases = shape.layers * (shape.q_size + 2 * shape.kv_size) if shape.qkv_bias else 0
    if shape.other_bias:
        qkv = {"q_proj", "k_proj", "v_proj", "attn.c_attn"}
        biases += shape.layers * sum(o for n, (_, o) in shape.linears().items() if n not in qkv)
    wide = 0
    if shape.wide is not None:
        sizes = (shape.hidden, shape.q_size, shape.kv_size, shape.heads)
        wide = shape.wide.more_parameters(*sizes)
    return linear_parameters(shape) + embeddings + norms + biases + wide + shape.other_parameters


def adapter_parameters(shape: Shape, r: int, target_modules: Targets = "all-linear") -> int:
    """Weights of a LoRA adapter: r rows of A and r columns of B for each targeted module, and the
    experts' at their own rank."""
    m, h = shape.mixture, shape.hidden
    ends = [t for t in target_modules if t.split(".")[-1] in EMBEDDINGS]
    beside = len(ends) * r * (h + shape.vocab)
    if m is None:
        chosen = shape.targeted(target_modules)
        return beside + sum(shape.count(n) * r * (i + o) for n, (i, o) in chosen.items())
    named = target_modules != "all-linear"
    outside = [t for t in target_modules if t not in families.EXPERT_PARTS] if named else []
    chosen = shape.targeted(outside if named else "all-linear")
    others = {n: io for n, io in chosen.items() if n not in MLP_NAMES}
    total = beside + sum(shape.count(n) * r * (i + o) for n, (i, o) in others.items())
    sparse = shape.layers - m.dense_layers
    if not named or len(outside) < len(target_modules):
        total += sparse * m.adapter(h, min(r, EXPERT_RANK))
    if m.others_adapted and not named:
        dense = sum(r * (i + o) for n, (i, o) in chosen.items() if n in MLP_NAMES)
        total += m.dense_layers * dense + sparse * (3 * r * (h + m.shared) if m.shared else 0)
    return total


def saved_parameters(shape: Shape, saved: tuple[str, ...]) -> int:
    """Weights of whole modules that train beside an adapter: embeddings, head, linears, norms."""
    outside, linears, total = shape.vocab * shape.hidden, shape.linears(), 0
    for name in saved:
        last = name.split(".")[-1]
        if last in EMBEDDINGS:
            total += outside
        elif last in linears:
            total += shape.count(last) * linears[last][0] * linears[last][1]
        else:
            total += shape.layers * shape.hidden
    return total
