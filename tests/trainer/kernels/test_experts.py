"""Adapters on experts, split from the weights, against PEFT's own way, which adds them up first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from trainer import families
from trainer.kernels import experts, reference

MIXTURES = [
    *("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "qwen3_5_moe", "nemotron_h"),
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "glm4_moe", "olmoe", "phimoe")),
]


def tuned(name: str, r: int = 4) -> Any:
    model = build(name)
    adapted = families.read(model.config.to_dict()).all_linear()
    settings = LoraConfig(
        r=r,
        lora_alpha=8,
        target_modules=list(adapted.modules),
        target_parameters=list(adapted.experts),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(model, settings)
    g = torch.Generator().manual_seed(3)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, 0, 0.1, generator=g)
        elif key.endswith("_bias"):  # of gpt-oss's experts
            torch.nn.init.normal_(p, 0, 0.3, generator=g)
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MIXTURES)
def test_split_adapters_of_experts_give_the_outputs_and_gradients_of_pefts(name):
    peft, split = tuned(name), tuned(name)
    assert experts.attach(split) > 0
    outs = [m(input_ids=ids(), use_cache=False).logits for m in (peft, split)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    for out in outs:
        out.float().log_softmax(-1)[..., 7].sum().backward()
    compared = 0
    for p, q in zip(peft.parameters(), split.parameters(), strict=True):
        if p.requires_grad and p.grad is not None:
            assert (p.grad - q.grad).abs().max() < 1e-3 * p.grad.abs().max().clamp_min(1e-6)
            compared += 1
    assert compared >= 20


def test_an_adapter_that_is_switched_off_or_merged_counts_for_nothing():
    model = tuned("qwen3_moe")
    experts.attach(model)
    with torch.no_grad():
        on = model(input_ids=ids(), use_cache=False).logits
        with model.disable_adapter():
            off = model(input_ids=ids(), use_cache=False).logits
        base = build("qwen3_moe")(input_ids=ids(), use_cache=False).logits
        merged = model.merge_and_unload()(input_ids=ids(), use_cache=False).logits
    torch.testing.assert_close(off, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, on, rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 0.01


def test_no_weight_of_all_experts_is_made_for_backward():
    """PEFT keeps one as large as the layer's experts."""
    model = tuned("qwen3_moe")
    experts.attach(model)
    whole = max(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not any(x.untyped_storage().data_ptr() == p.data_ptr() for p in model.parameters()):
            kept.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    few = torch.randint(5, 300, (1, 2), generator=torch.Generator().manual_seed(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=few, use_cache=False)
    assert kept and max(kept) < whole


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("turned", [False, True])
def test_a_grouped_product_is_one_product_an_expert_also_for_empty_groups(n, turned):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=g)
    shape = (4, n, 16) if turned else (4, 16, n)
    weight = torch.randn(shape, generator=g)
    weight = weight.transpose(1, 2) if turned else weight
    ends = torch.tensor([5, 5, 18, 20], dtype=torch.int32)
    want = torch.cat([x[:5] @ weight[0], x[5:18] @ weight[2], x[18:] @ weight[3]])
    torch.testing.assert_close(experts.grouped(x, weight, ends), want)
    torch.testing.assert_close(experts._one_by_one(x, weight, ends), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("r", [4, 8])
def test_bf16_experts_on_the_gpu_agree_with_fp32_on_the_cpu(r):
    assert experts._probe(torch.device("cuda"), torch.bfloat16)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = tuned("qwen3_moe", r)
        experts.attach(model)
        for p in model.parameters():
            p.data = p.data.to(device, torch.float32 if p.requires_grad else dtype)
        layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3MoeExperts")
        g = torch.Generator().manual_seed(0)
        x = torch.randn(64, 32, generator=g).to(device, dtype).requires_grad_()
        chosen = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(64)]).to(device)
        weights = torch.rand(64, 2, generator=g).to(device, dtype)
        out = experts.forward(layer, x, chosen, weights)
        out.float().pow(2).sum().backward()
        held = layer.adapters_of_experts.values()
        grads = [w.lora_A["default"].weight.grad for w in held]
        results.append([t.detach().float().cpu() for t in (out, x.grad, *grads)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()


def test_the_clamped_gate_is_that_of_transformers_both_ways():
    """Beyond its limits too, which a small model does not reach."""
    rule = SimpleNamespace(alpha=1.702, limit=1.5)
    gu, bias = torch.randn(50, 24) * 2, torch.randn(3, 24)
    expert, dact, share = torch.arange(50) % 3, torch.randn(50, 12), torch.rand(50)
    before = gu + bias[expert]
    before.requires_grad_()
    want = GptOssExperts._apply_gate(rule, before)
    want.backward(dact * share[:, None])
    kept = gu.clone()
    act = reference.clamped_forward_(kept, None, bias, expert, 1.702, 1.5)
    torch.testing.assert_close(act, want)
    act, dgu, dshare = reference.clamped_backward_(kept, dact.clone(), None, share, 1.702, 1.5)
    torch.testing.assert_close(act, want)
    torch.testing.assert_close(dgu, before.grad)
    torch.testing.assert_close(dshare, (want * dact).sum(-1))
