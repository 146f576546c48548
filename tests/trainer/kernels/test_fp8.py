"""FP8 frozen weights on the eager path: what the format can hold, and both products within the
error that it promises."""

from __future__ import annotations

import pytest
import torch

from trainer.kernels import reference
from trainer.kernels.fp8 import FP8, FP8_MAX, Fp8Weight


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(96, 160) * torch.logspace(-3, 1, 96)[:, None]  # rows of very different size


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_weight_is_one_byte_a_parameter_with_one_scale_a_row(weight):
    frozen = Fp8Weight(weight)
    assert frozen.w8.dtype == FP8 and frozen.w8.shape == weight.shape
    assert frozen.column_scale.shape == (96,)
    assert (frozen.w8.float().abs().amax(1) == FP8_MAX).all()  # each row uses the whole range


def test_every_row_keeps_its_own_precision(weight):
    dense = Fp8Weight(weight).dense()
    for got, want in zip(dense, weight, strict=True):
        assert error(got, want) < 0.04


def test_forward_and_backward_are_near_the_exact_products(weight):
    frozen = Fp8Weight(weight)
    x, dy = torch.randn(50, 160), torch.randn(50, 96)
    x8, scale, _ = reference.quantise_rows(x, None, None)
    assert error(frozen.forward(x8, scale), x @ weight.t()) < 0.05
    d8, scale, _ = reference.quantise_rows(dy, frozen.column_scale, None)
    assert error(frozen.backward(d8, scale), dy @ weight) < 0.05


def test_the_row_scale_is_folded_into_the_gradient_not_forgotten(weight):
    frozen = Fp8Weight(weight)
    dy = torch.randn(50, 96)
    d8, scale, _ = reference.quantise_rows(dy, None, None)
    assert error(frozen.backward(d8, scale), dy @ weight) > 0.5


def test_a_row_of_zeros_stays_zero_and_finite():
    x = torch.zeros(3, 32)
    x[1, 4] = 5.0
    x8, scale, _ = reference.quantise_rows(x, None, None)
    assert (x8.float()[[0, 2]] == 0).all() and torch.isfinite(scale).all() and (scale > 0).all()
    assert float(x8[1, 4].float() * scale[1]) == pytest.approx(5.0)


def test_some_rows_of_a_weight_are_the_same_weight(weight):
    frozen = Fp8Weight(weight, keep_transpose=True)
    assert torch.equal(frozen.rows(16, 48).dense(), frozen.dense()[16:48])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep_transpose", [False, True])
def test_the_gpu_computes_what_the_decoded_weights_say(keep_transpose):
    torch.manual_seed(1)
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    frozen = Fp8Weight(weight, keep_transpose=keep_transpose)
    x, dy = (torch.randn(100, n, device="cuda", dtype=torch.bfloat16) for n in (512, 256))
    x8, scale, _ = reference.quantise_rows(x, None, None)
    assert (
        error(
            frozen.forward(x8, scale).float(),
            (x8.float() * scale[:, None]) @ frozen.dense().float().t(),
        )
        < 0.01
    )
    d8, scale, _ = reference.quantise_rows(dy, frozen.column_scale, None)
    assert (
        error(frozen.backward(d8, scale).float(), (d8.float() * scale[:, None]) @ frozen.w8.float())
        < 0.01
    )
