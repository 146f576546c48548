"""NF4 frozen weights: bitsandbytes' own bytes and values, made without it."""

from __future__ import annotations

import pytest
import torch

from trainer.kernels.nf4 import BLOCK, CODEBOOK, Nf4Weight, quantise_nf4


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(48, 256) * 0.02


def test_the_bytes_and_scales_are_those_of_bitsandbytes(weight):
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    ours, absmax = quantise_nf4(weight)
    assert torch.equal(ours, packed.flatten())
    torch.testing.assert_close(absmax, state.absmax)
    torch.testing.assert_close(Nf4Weight(weight).dense(), functional.dequantize_4bit(packed, state))


def test_half_a_byte_a_parameter_and_a_scale_for_every_64(weight):
    frozen = Nf4Weight(weight)
    assert frozen.packed.numel() == weight.numel() // 2
    assert frozen.absmax.numel() == weight.numel() // 64


def test_values_of_the_codebook_survive_exactly():
    scales = torch.tensor([0.5, 2.0, 1.0])
    weight = (torch.tensor(CODEBOOK).repeat(4)[None] * scales[:, None]).repeat(1, 2)
    torch.testing.assert_close(Nf4Weight(weight).dense(), weight)


def test_the_error_is_that_of_four_bits(weight):
    dense = Nf4Weight(weight).dense()
    assert 0.05 < float((dense - weight).norm() / weight.norm()) < 0.12


def test_both_products_use_the_decoded_weight(weight):
    frozen = Nf4Weight(weight)
    dense = frozen.dense()
    x, dy = torch.randn(7, 256), torch.randn(7, 48)
    torch.testing.assert_close(frozen.forward(x), x @ dense.t())
    torch.testing.assert_close(frozen.backward(dy), dy @ dense)
    torch.testing.assert_close(frozen.rows(8, 24).forward(x), x @ dense[8:24].t())


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(2, 128)
    weight[1, 70] = 3.0
    dense = Nf4Weight(weight).dense()
    assert dense[1, 70] == 3.0 and dense.count_nonzero() == 1


def test_columns_that_do_not_fill_blocks_are_refused_with_the_number():
    with pytest.raises(ValueError, match=r"blocks of 64, this weight has 100 columns"):
        Nf4Weight(torch.randn(4, 100))
