"""Start-up self-test of attention whose documents read the keys of others, run where rows of a pack
share their beginnings."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch

from trainer.data.shared_keys import SharedKeys, shared_keys
from trainer.data.sharing import Borrowed
from trainer.kernels.attention import KeyEnds
from trainer.kernels.decoder_layer import FastLayer, Packed
from trainer.kernels.verify import OTHERWISE, short_attention_error, short_attention_inputs

# tokens of documents, and how many more they read of which
LENGTHS = [150, 100, 60, 90]
BORROWED = [Borrowed(0, 0), Borrowed(0, 90), Borrowed(0, 64), Borrowed(3, 0)]


def distrusts_sharing(kinds: list[FastLayer]) -> str:
    """Why attention for short documents must not read the keys of others in place, or "" where it
    agrees with its twin on the layers' heads, or does not compute them."""
    asked = []
    for found in map(short_attention_inputs, kinds):
        if found is not None:
            *tensors, packed, rules, sinks, pairs, turned = found
            rules = replace(rules, window=None)
            asked.append((*tensors, sharing(packed), rules, sinks, pairs, turned))
    if not asked:
        return ""
    try:
        with kinds[0].ops.only_compiling():
            for one in asked:
                short_attention_error(*one)
        errors = [short_attention_error(*one) for one in asked]
    # a card that lacks the memory or the instructions: Triton's errors share no class
    except Exception as why:
        return f"attention over shared keys does not run here ({type(why).__name__}: {why})"
    if all(error < OTHERWISE for error in errors):
        return ""
    return f"attention over shared keys is off by {max(errors):.4f}"


def sharing(packed: Packed) -> Packed:
    """The pack with the documents of LENGTHS and BORROWED, which have as many tokens."""
    device = packed.cu.device
    keys, ends = shared_keys(LENGTHS, BORROWED)
    keys = SharedKeys(*(x.to(device) for x in keys))
    cu = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    there = KeyEnds(ends.to(device), int(ends.diff().max()))
    return packed._replace(cu=cu, longest=max(LENGTHS), shared=keys, ends=there)
