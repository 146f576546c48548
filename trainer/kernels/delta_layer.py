"""A decoder layer with a gated delta net in attention's place, as one autograd function.

Per token forward saves the joined projection before the convolution (q, k, v, z and two logits a
head), the rule's output, and the solved systems of the rule's chunks. Backward recomputes the
convolution, the norms of q and k, the decays, the gated norm and the rule's states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.decoder_layer import (
    FastLayer,
    Packed,
    SavedActivations,
    Turned,
    add_lora_,
)
from trainer.kernels.nets import Net
from trainer.kernels.spans import spans


@dataclass(kw_only=True)
class DeltaLayer(FastLayer):
    """``qkv`` is the joined projection of ``Net``; ``heads`` counts the heads of v, ``kv_heads``
    those of k, ``head_dim`` their columns; ``rules`` is not used."""

    net: Net

    @property
    def attends(self) -> bool:
        return False

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, self.net.sizes[0], self.net.values)

    def _mix(
        self, joined: Tensor, t: Tensor | None, packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        delta, net = self.ops.delta, self.net
        add_lora_(joined, t, self.qkv.b, self.qkv.sizes)
        of_rule = self._of_rule(joined, packed)
        out, kept = delta.rule_forward(*of_rule, packed.cu)
        return delta.gated_norm_forward(out, joined, net), joined, out, kept

    def _of_rule(self, joined: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        """The inputs of the rule: q, k, v, decay, beta."""
        at = spans(packed.cu, len(joined))
        mixed = self.ops.delta.mix_forward(joined, self.net, at)
        return (*mixed, *self.ops.delta.decay_forward(joined, self.net))

    def _ungate(self, dout: Tensor, kept: SavedActivations) -> tuple[Tensor, Tensor, Tensor | None]:
        """The third result is the gradient of the joined projection, of which only z's columns are
        written so far."""
        d = torch.empty_like(kept.qkv)
        out = self.ops.delta.gated_norm_backward_(dout, kept.out, kept.qkv, d, self.net)
        return out, dout, d

    def _unmix(
        self, dout: Tensor, kept: SavedActivations, packed: Packed, dgate: Tensor | None
    ) -> Turned:
        assert dgate is not None
        delta, d, joined = self.ops.delta, dgate, kept.qkv
        of_rule = self._of_rule(joined, packed)
        dout = dout.view_as(kept.out)
        found = delta.rule_backward(dout, of_rule, kept.flash, packed.cu)
        dqkv, ddecay, dbeta = found
        delta.mix_backward_(d, joined, dqkv, self.net, spans(packed.cu, len(joined)))
        delta.decay_backward_(d, joined, ddecay, dbeta, self.net)
        more = (self.qkv.b, self.qkv.weight.column_scale, self.qkv.sizes)
        return (d, *self.ops.joined_backward(d, *more))
