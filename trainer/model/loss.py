"""Summed cross-entropy over target tokens, in fp32, without the logits of a whole batch.

The head never trains, so forward can finish the work: a chunk of logits gives its losses and at
once d(hidden) of that chunk (4 M h V FLOPs, no second pass over the logits, no d(head)), and only
that is kept. A head that does train (full fine-tuning) gets its gradient in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.backend import operations

LOGITS_PER_CHUNK = 1 << 26  # 256 MiB of fp32 logits at a time
TILE = 128  # rows that a product computes together: a part of one costs as much as the whole


class _LogProbs(torch.autograd.Function):
    """log p of each target, whose gradient weighs each target by itself: d(hidden) of a target is
    its weight times what the forward pass made while its logits were there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, scale: float, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        ops = operations(x.device)
        log_probs = x.new_empty(len(x), dtype=torch.float32)
        entropies = torch.empty_like(log_probs)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for part in chunks(len(x), head.shape[0]):
            logits = _product_fp32(x[part], head.t())
            rules = (targets[part], scale, cap)
            log_probs[part], entropies[part] = ops.log_prob_rows(logits, *rules)
            if dx is not None:
                _, grad = ops.cross_entropy_rows(logits, targets[part], x.dtype, scale, cap)
                torch.mm(grad, head, out=dx[part])
        ctx.save_for_backward(dx)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        [dx] = ctx.saved_tensors
        return (dx * -weights[:, None]).to(dx.dtype), None, None, None, None


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of `rows` targets, each of at most LOGITS_PER_CHUNK logits, or of 16 rows; of whole
    tiles where that leaves one."""
    size = max(16, LOGITS_PER_CHUNK // vocabulary)
    size -= size % TILE if size > TILE else 0
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        ops = operations(x.device)
        total = torch.zeros((), device=x.device, dtype=torch.float32)
        need_x, need_head = ctx.needs_input_grad[:2]
        wide = torch.float32 if x.dtype is torch.float16 else x.dtype  # before the loss is scaled
        dx = torch.empty_like(x, dtype=wide) if need_x else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        for part in chunks(len(x), head.shape[0]):
            logits = _product_fp32(x[part], head.t())
            loss, grad = ops.cross_entropy_rows(logits, targets[part], x.dtype, scale, cap)
            total += loss.sum()
            if dx is not None and wide is x.dtype:
                torch.mm(grad, head, out=dx[part])
            elif dx is not None:
                dx[part] = _product_fp32(grad, head)
            if dhead is not None:
                dhead += _product_fp32(grad.t(), x[part])
        ctx.save_for_backward(dx, None if dhead is None else dhead.to(head.dtype))
        ctx.given = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dhead = ctx.saved_tensors
        return (
            None if dx is None else (dx * dloss.to(dx.dtype)).to(ctx.given),
            None if dhead is None else dhead * dloss.to(dhead.dtype),
            *(None, None, None),
        )


def _product_fp32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def target_loss_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    targets_at: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Sum over target tokens of -log p(label), fp32, 0-d; differentiable in ``hidden`` (and in
    ``head_weight`` if it asks).

    ``hidden`` [..., h] is the state after the final norm. ``labels`` [...] are already shifted:
    ``labels[i]`` is the token that position i must predict, -100 where there is none.
    ``targets_at`` (int64, flat positions of the targets, made on the CPU where the pack was made)
    spares the head the other positions; without it every position is computed, since finding the
    targets here would wait for the GPU. Logits are multiplied by ``scale``, then squashed to
    cap tanh(x / cap). Dividing by the number of targets of the global step is the caller's part.
    Costs 4 h V FLOPs a position."""
    x, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if len(x) != len(targets):
        raise ValueError(
            f"{len(x)} hidden states but {len(targets)} labels: both must cover the same positions"
        )
    if targets_at is not None:
        x, targets = x.index_select(0, targets_at), targets.index_select(0, targets_at)
    rows = x.contiguous()
    apply: Any = _TargetLoss.apply
    loss = apply(rows, head_weight, targets, scale, cap)
    assert isinstance(loss, Tensor)
    return loss


def log_probs_of(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    targets_at: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(log p of each target token, entropy of the distribution that it was drawn from), both fp32
    (targets,), in the order of ``targets_at``; arguments as ``target_loss_sum``'s. Logits are
    divided by ``temperature`` at last. The first is
    differentiable in ``hidden``, each target with a weight of its own. No logits are kept: 2 h V
    FLOPs a target without gradients, 4 h V with them."""
    x = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets_at)
    apply: Any = _LogProbs.apply
    targets = labels.reshape(-1).index_select(0, targets_at)
    # cap tanh(y / cap) / t is the same rule with scale and cap divided by t
    cap = None if cap is None else cap / temperature
    log_probs, entropies = apply(x, head_weight, targets, scale / temperature, cap)
    return log_probs, entropies
