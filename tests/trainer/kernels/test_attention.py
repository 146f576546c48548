"""Packed attention against torch's, one document at a time; gradients too; grouped heads too."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trainer.kernels.attention import (
    _Varlen,
    document_mask,
    flash_backward,
    flash_forward,
    name,
    packed_attention,
    short_kernels,
)

ENDS = [0, 5, 6, 19, 32]


def one_by_one(q, k, v, scale):
    """q [1, H, M, D] -> [1, M, H, D]."""
    parts = [
        scaled_dot_product_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scale, enable_gqa=True
        )
        for a, b in pairwise(ENDS)
    ]
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("way", ["by document", "the GPU's, on its twin"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_each_document_is_attended_alone_with_the_right_gradients(kv_heads, way):
    torch.manual_seed(0)
    cu = torch.tensor(ENDS, dtype=torch.int32)
    q, k, v = (torch.randn(1, n, 32, 16).requires_grad_() for n in (4, kv_heads, kv_heads))
    if way == "by document":
        out, _ = packed_attention(
            SimpleNamespace(), q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, max_length_q=13
        )
    else:
        out = _Varlen.apply(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, 13, 0.3)[None]
    want = one_by_one(q, k, v, 0.3)
    torch.testing.assert_close(out, want)
    d = torch.randn_like(want)
    got, expected = (torch.autograd.grad(x, (q, k, v), d, retain_graph=True) for x in (out, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_boundaries_a_row_is_one_causal_sequence():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    out, _ = packed_attention(SimpleNamespace(), q, k, v, None, scaling=0.5)
    torch.testing.assert_close(
        out, scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5).transpose(1, 2)
    )


def test_new_tokens_after_a_cache_see_all_of_it_and_not_the_future():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    out, _ = packed_attention(SimpleNamespace(), q, k, v, None)
    whole = torch.cat([torch.randn(1, 2, 7, 8), q], 2)
    want = scaled_dot_product_attention(whole, k, v, is_causal=True)[:, :, 7:]
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_two_rows_with_boundaries_are_refused():
    q = torch.randn(2, 2, 6, 8)
    with pytest.raises(ValueError, match="packed attention takes one row, got 2"):
        packed_attention(
            SimpleNamespace(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 6]), max_length_q=6
        )


def test_the_document_mask_is_causal_and_blocks_other_documents():
    mask = document_mask(torch.tensor([0, 2, 3, 5], dtype=torch.int32), 5)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_the_cpu_gets_the_eager_twin_and_says_so():
    q = torch.randn(6, 2, 64, dtype=torch.bfloat16)
    assert short_kernels(q, q, q, 6) is None
    assert name(False, torch.device("cpu")) == "eager"
    assert name(True, torch.device("cuda")).startswith("Triton") and name(
        False, torch.device("cuda")
    ).startswith("torch flash")


def test_mixed_precision_attends_in_the_lower_one():
    """Rotary angles are fp32 and make q and k so."""
    cu = torch.tensor(ENDS, dtype=torch.int32)
    q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(
            SimpleNamespace(),
            q,
            k,
            v.bfloat16(),
            None,
            scaling=0.3,
            cu_seq_lens_q=cu,
            max_length_q=13,
        )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), one_by_one(q, k, v, 0.3), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixed", [True, False])
def test_a_long_pack_never_makes_a_square(mixed):
    """32 heads of 16,384 x 16,384 fp32 are 34 GB. Mixed precision and fp32 alike."""
    ends = list(range(0, 16384 + 1, 256))
    cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(1, 32, 16384, 64, device="cuda").requires_grad_() for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        out, _ = packed_attention(
            SimpleNamespace(), q, k, v, None, scaling=0.125, cu_seq_lens_q=cu, max_length_q=256
        )
    out.float().sum().backward()
    assert torch.cuda.max_memory_allocated() < 3e9 and torch.isfinite(q.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_gpu_agrees_with_the_eager_twin(kv_heads):
    torch.manual_seed(0)
    ends = [0, 70, 71, 300, 513]
    cu = torch.tensor(ends, dtype=torch.int32)
    q, k, v = (torch.randn(513, n, 64).bfloat16() for n in (4, kv_heads, kv_heads))
    d = torch.randn(513, 4, 64).bfloat16()
    results = []
    for device in ("cuda", "cpu"):
        x = [t.to(device) for t in (q, k, v)]
        out, kept = flash_forward(*x, cu.to(device), 229, 0.125)
        results.append(
            [out, *flash_backward(d.to(device), *x, out, kept, cu.to(device), 229, 0.125)]
        )
    for a, b in zip(*results, strict=True):
        assert (a.cpu().float() - b.float()).norm() < 0.01 * b.float().norm()
