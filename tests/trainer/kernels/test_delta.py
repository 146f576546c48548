"""Gated delta nets over packed rows, on the CPU, where plain torch computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build

from trainer.kernels import delta
from trainer.kernels import delta_reference as reference
from trainer.kernels.spans import spans

CU = torch.tensor([0, 5, 6, 20], dtype=torch.int32)


def net(name: str = "qwen3_5") -> Any:
    model = build(name)
    delta.by_document(model)
    return next(m for m in model.modules() if type(m).__name__ in delta.CLASSES)


def test_what_stands_in_one_document_changes_nothing_in_the_next() -> None:
    module, g = net(), torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 32, generator=g)
    other = x.clone()
    other[:, :6] = torch.randn(1, 6, 32, generator=g)
    out, changed = (module(h, cu_seq_lens_q=CU) for h in (x, other))
    torch.testing.assert_close(out[:, 6:], changed[:, 6:], rtol=0, atol=0)
    assert (out[:, :6] - changed[:, :6]).abs().max() > 1e-3


def test_the_rule_alone_would_leak_through_the_convolution() -> None:
    module = net()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    taps, first = torch.ones(8, 4), spans(CU, 20).first
    kept, leaked = (reference.correlate(x, taps, f) for f in (first, torch.zeros_like(first)))
    assert not torch.allclose(kept[6:9], leaked[6:9])
    torch.testing.assert_close(kept[9:], leaked[9:])
    assert module.conv1d.weight.shape[-1] == 4


def test_rows_without_boundaries_are_what_transformers_computes_of_them() -> None:
    module, g = net("qwen3_5_moe"), torch.Generator().manual_seed(0)
    x, mask = torch.randn(2, 70, 32, generator=g), torch.ones(2, 70)
    mask[1, 40:] = 0
    found = module(x, attention_mask=mask)
    torch.testing.assert_close(found, module.with_cache(x, attention_mask=mask))
    assert found.abs().max() > 1e-3


def test_what_has_a_cache_keeps_the_modules_own_forward() -> None:
    module, asked = net(), []
    module.with_cache = lambda x, **more: asked.append(more) or x
    module(torch.zeros(1, 20, 32), cache_params=object())
    assert len(asked) == 1


def test_a_pack_is_one_row() -> None:
    with pytest.raises(ValueError, match="one row"):
        net()(torch.zeros(2, 20, 32), cu_seq_lens_q=CU)


def test_only_a_gpu_asks_for_fla_core() -> None:
    assert delta.why_not(torch.device("cpu")) == ""
    assert "row by row" in delta.why_not(torch.device("cuda"), "fp32")


def test_where_fla_core_does_not_serve_the_reason_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, where it may serve")
    assert "fla-core" in delta.why_not(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(16, 32), (16, 16), (2, 4)])
def test_the_rule_of_fla_core_is_its_definition_on_this_gpu(heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    assert delta.why_not(device) == ""
    assert delta.rule_error(device, *heads, 128, 128) < 0.01
