"""Each Triton kernel against its eager twin: under Triton's interpreter on the CPU where Triton is
installed, and compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/trainer/kernels/test_triton_ops.py
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from trainer.kernels import reference, triton_ops  # noqa: E402
from trainer.kernels.nf4 import CODEBOOK, quantise_nf4  # noqa: E402
from trainer.kernels.norms import HeadNorms  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
M, K, F, R, D = 37, 144, 208, 16, 32


@pytest.fixture(autouse=True, params=["few rows", "whole tiles"])
def _seed(request):
    """Each test runs with the tiles of a short micro-batch, and with those of a long one over the
    same few rows."""
    torch.manual_seed(11)
    with triton_ops.whole_tiles() if request.param == "whole tiles" else nullcontext():
        yield


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, DTYPE)


def agree(got, want) -> None:
    """Same structure; relative error under bf16's rounding; FP8 codes may differ by one step where
    a value falls on an edge."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        # the interpreter casts to FP8 by cutting off, the hardware to nearest
        step = 0.07 if INTERPRETED else 0.03
        bound = (
            step
            if a.dtype == torch.float8_e4m3fn
            else 0.01
            if a.dtype == torch.bfloat16
            else 1e-4
            if INTERPRETED
            else 0.005
        )
        a, b = a.float(), b.float()
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= bound * b.norm(), f"{float((a - b).norm() / b.norm()):.4f}"


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_norm_forward_is_its_twin(fp8, add):
    h, weight, a = random(M, K), random(K), random(3 * R, K, scale=0.1)
    extra = (random(M, K), random(M, R), random(K, R, scale=0.1)) if add else ()
    agree(
        triton_ops.norm_forward(h, weight, 1e-5, a, fp8, *extra),
        reference.norm_forward(h, weight, 1e-5, a, fp8, *extra),
    )


def test_norm_forward_without_an_adapter_is_its_twin():
    h, weight = random(M, K), random(K)
    agree(
        triton_ops.norm_forward(h, weight, 1e-5, None, False),
        reference.norm_forward(h, weight, 1e-5, None, False),
    )


@pytest.mark.parametrize("lora", [False, True])
def test_norm_backward_is_its_twin(lora):
    dx, h, weight, residual = random(M, K), random(M, K), random(K), random(M, K)
    dt, a = (random(M, 3 * R), random(3 * R, K, scale=0.1)) if lora else (None, None)
    rstd = torch.rsqrt(h.float().pow(2).mean(-1) + 1e-5)
    t = reference.norm_forward(h, weight, 1e-5, a, False)[3]
    for rest in (residual, None):
        got, want = (
            ops.norm_backward(dx, dt, t, a, h, weight, rstd, rest)
            for ops in (triton_ops, reference)
        )
        agree([got], [want])


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(M, D // 2).repeat(1, 2) * 6
    return angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rope_forward_is_its_twin(lora, bias):
    heads, kv_heads = 4, 2
    n = (heads + 2 * kv_heads) * D
    qkv, b, shift = (
        random(M, n),
        random(n, R, scale=0.1) if lora else None,
        random(n) if bias else None,
    )
    t = random(M, 3 * R) if lora else None
    cos, sin = angles()
    got, want = qkv.clone(), qkv.clone()
    triton_ops.rope_forward_(got, t, b, shift, cos, sin, heads, kv_heads)
    reference.rope_forward_(want, t, b, shift, cos, sin, heads, kv_heads)
    agree([got], [want])


@pytest.mark.parametrize("fp8", [False, True])
def test_rope_backward_is_its_twin(fp8):
    heads, kv_heads = 4, 2
    n = (heads + 2 * kv_heads) * D
    dq, dk, dv, b = (
        random(M, heads, D),
        random(M, kv_heads, D),
        random(M, kv_heads, D),
        random(n, R, scale=0.1),
    )
    cos, sin = angles()
    fold = (torch.rand(n) + 0.5).to(DEVICE) if fp8 else None
    agree(*(ops.rope_backward(dq, dk, dv, cos, sin, b, fold) for ops in (triton_ops, reference)))
    agree(*(ops.rope_backward(dq, dk, dv, cos, sin, None, fold) for ops in (triton_ops, reference)))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_norms_of_heads_with_rotary_are_their_twins_both_ways(added, values, pairs):
    heads, kv_heads = 3, 1
    n = (heads + 2 * kv_heads) * D
    qkv, b, bias = random(M, n), random(n, R, scale=0.1), random(n)
    extra = (random(M, 3 * R), b, bias) if added else (None, None, None)
    weight = torch.rand(3, D).to(DEVICE) + 0.5
    rest = (*angles(), heads, kv_heads, HeadNorms(weight, 1e-5, values), pairs)
    touched = (heads + (2 if values else 1) * kv_heads) * D
    found = []
    for ops in (triton_ops, reference):
        before = qkv.clone()
        after = ops.rope_forward_(before, *extra, *rest)
        torch.manual_seed(4)
        grad = random(M, n)
        ops.head_norm_backward_(grad, qkv, *rest)
        found.append([before, after[:, :touched], grad])
    agree(*found)


@pytest.mark.parametrize("fp8", [False, True])
def test_rotation_of_neighbours_is_its_twin_both_ways(fp8):
    heads, kv_heads = 3, 1
    n = (heads + 2 * kv_heads) * D
    qkv, t, b = random(M, n), random(M, 3 * R), random(n, R, scale=0.1)
    dq, dk, dv = random(M, heads, D), random(M, kv_heads, D), random(M, kv_heads, D)
    fold = (torch.rand(n) + 0.5).to(DEVICE) if fp8 else None
    cos, sin = angles()
    found = []
    for ops in (triton_ops, reference):
        turned = ops.rope_forward_(qkv.clone(), t, b, None, cos, sin, heads, kv_heads, None, True)
        found.append([turned, *ops.rope_backward(dq, dk, dv, cos, sin, b, fold, True)])
    agree(*found)


@pytest.mark.parametrize("lora", [False, True])
def test_the_norm_of_a_branch_is_its_twin(lora):
    h, y, weight = random(M, K), random(M, K), random(K).float()
    extra = (random(M, R), random(K, R, scale=0.1)) if lora else (None, None)
    agree(
        *(
            ops.branch_forward(h, y.clone(), *extra, weight, 1e-5, 0.7)
            for ops in (triton_ops, reference)
        )
    )


@pytest.mark.parametrize("fold", [False, True])
def test_quantise_rows_is_its_twin(fold):
    x, p = random(M, K), random(R, K, scale=0.1).t()
    column = (torch.rand(K) + 0.5).to(DEVICE) if fold else None
    agree(triton_ops.quantise_rows(x, column, p), reference.quantise_rows(x, column, p))
    agree(triton_ops.quantise_rows(x, column, None), reference.quantise_rows(x, column, None))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_swiglu_is_its_twin_both_ways(fp8, lora, gelu):
    gu, dact = random(M, 2 * F), random(M, F)
    t, b = (random(M, 2 * R), random(2 * F, R, scale=0.1)) if lora else (None, None)
    a, dt = (random(R, F, scale=0.1), random(M, R)) if lora else (None, None)
    agree(*(ops.swiglu_forward(gu, t, b, a, fp8, gelu) for ops in (triton_ops, reference)))
    fold = (torch.rand(2 * F) + 0.5).to(DEVICE) if fp8 else None
    agree(
        *(
            ops.swiglu_backward(gu.clone(), t, b, dact.clone(), dt, a, fold, gelu)
            for ops in (triton_ops, reference)
        )
    )


@pytest.mark.parametrize("rows", [37, 2100])  # one split, and two of which the second is not full
def test_cast_outer_is_its_twin(rows):
    x, t = random(rows, K), random(rows, 2 * R)
    column, scale = (
        (torch.rand(K) + 0.5).to(DEVICE),
        reference.quantise_rows(x, None, None)[1] * 1.5,
    )
    agree(triton_ops.cast_outer(x, column, scale, t), reference.cast_outer(x, column, scale, t))
    agree(
        triton_ops.cast_outer(x, column, scale, None), reference.cast_outer(x, column, scale, None)
    )


@pytest.mark.parametrize("lora", [False, True])
def test_what_stands_between_the_products_of_experts_is_its_twin(lora):
    gu, dact, share = random(M, 2 * F), random(M, F), random(M)
    wide, narrow = (random(M, 2 * F), random(M, F)) if lora else (None, None)
    found = []
    for ops in (triton_ops, reference):
        before = gu.clone()
        act = ops.gate_forward_(before, wide)
        found.append([before, act, *ops.gate_backward_(gu.clone(), dact.clone(), narrow, share)])
    agree(*found)
    back, shares = torch.randperm(36, device=DEVICE), random(12, 3)
    y, more = random(36, K), random(36, K) if lora else None
    agree(*([ops.combine(y, more, back, shares)] for ops in (triton_ops, reference)))


@pytest.mark.parametrize("lora", [False, True])
def test_the_clamped_gate_and_the_biases_of_experts_are_their_twins(lora):
    gu, dact, share = random(M, 2 * F, scale=2.0), random(M, F), random(M)
    wide, narrow = (random(M, 2 * F), random(M, F)) if lora else (None, None)
    bias, expert = random(5, 2 * F), torch.randint(0, 5, (M,), device=DEVICE).sort().values
    found = []
    for ops in (triton_ops, reference):
        before = gu.clone()
        act = ops.clamped_forward_(before, wide, bias, expert, 1.702, 2.5)
        more = (narrow, share, 1.702, 2.5)
        found.append([before, act, *ops.clamped_backward_(gu.clone(), dact.clone(), *more)])
    agree(*found)
    back, shares = torch.randperm(36, device=DEVICE), random(12, 3)
    y, more, down = random(36, K), random(36, K) if lora else None, random(5, K)
    whose = torch.randint(0, 5, (36,), device=DEVICE)
    agree(*([ops.combine(y, more, back, shares, down, whose)] for ops in (triton_ops, reference)))


def test_residual_add_is_its_twin():
    h, y, t, b = random(M, K), random(M, K), random(M, R), random(K, R, scale=0.1)
    agree([triton_ops.residual_add(h, y.clone(), t, b)], [reference.residual_add(h, y, t, b)])
    agree(
        [triton_ops.residual_add(h, y.clone(), None, None)],
        [reference.residual_add(h, y, None, None)],
    )


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (0.5, 2.0)])
def test_cross_entropy_is_its_twin_and_skips_what_is_no_target(scale, cap):
    logits = torch.randn(9, 5000, device=DEVICE) * 3
    targets = torch.randint(0, 5000, (9,), device=DEVICE)
    targets[4] = -100
    got = triton_ops.cross_entropy_rows(logits, targets, DTYPE, scale, cap)
    agree(got, reference.cross_entropy_rows(logits, targets, DTYPE, scale, cap))
    assert got[0][4] == 0 and got[1][4].abs().max() == 0


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (0.5, 2.0)])
def test_log_probs_and_entropies_are_their_twins(scale, cap):
    logits = torch.randn(9, 5000, device=DEVICE) * 3
    targets = torch.randint(0, 5000, (9,), device=DEVICE)
    rules = (logits, targets, scale, cap)
    agree(triton_ops.log_prob_rows(*rules), reference.log_prob_rows(*rules))


def test_nf4_is_decoded_as_its_twin_does():
    weight = random(64, 192)
    packed, absmax = quantise_nf4(weight)
    codebook = torch.tensor(CODEBOOK, device=DEVICE)
    agree(
        *(
            [ops.dequantise_nf4(packed, absmax, codebook, torch.empty_like(weight), 64)]
            for ops in (triton_ops, reference)
        )
    )


@pytest.mark.parametrize("columns", [96, 515])
def test_fp8_is_unpacked_as_its_twin_does(columns):
    """To the last bit: one product in fp32, rounded once."""
    w8, scale, _ = reference.quantise_rows(random(70, columns), None, None)
    got, want = (
        ops.dequantise_rows(w8, scale, torch.full((70, columns), 9.0, device=DEVICE, dtype=DTYPE))
        for ops in (triton_ops, reference)
    )
    assert torch.equal(got, want)


def test_fp8_is_transposed_as_its_twin_does():
    w = random(80, 176).to(torch.float8_e4m3fn)
    assert torch.equal(
        triton_ops.transpose_fp8(w).view(torch.uint8), reference.transpose_fp8(w).view(torch.uint8)
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_what_is_compiled_ahead_is_not_launched():
    h, y = random(M, K), random(M, K)
    before = y.clone()
    with triton_ops.only_compiling():
        triton_ops.residual_add(h, y, None, None)
    assert torch.equal(y, before)
    triton_ops.residual_add(h, y, None, None)
    agree((y,), (h + before,))
