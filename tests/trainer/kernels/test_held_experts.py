"""Experts held in FP8 and NF4, against the same model with the values that these stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import families
from trainer.kernels import backend, experts, verify
from trainer.kernels.attention import register
from trainer.kernels.fp8 import Fp8Weight
from trainer.kernels.frozen import freeze_weight
from trainer.kernels.lora import base_linear
from trainer.kernels.patch import accelerate_model
from trainer.model.load import prepare
from trainer.model.parts import decoder_layers

WIDE = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
MIXTURES = ["qwen3_moe", "gpt_oss"]


def mixture(name: str, adapt_experts: bool = True) -> Any:
    """With adapters whose B is not zero, in fp32."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(3)
    more = {**WIDE, "initializer_range": 0.1}
    config = AutoConfig.for_model(kind, **{**settings, **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    for key, p in model.named_parameters():
        if key.endswith("_bias"):
            nn.init.normal_(p, 0.0, 0.3)
    model.family = families.read(model.config.to_dict())
    adapted = model.family.all_linear(experts=adapt_experts)
    asked = LoraConfig(
        r=4,
        target_modules=list(adapted.modules),
        target_parameters=list(adapted.experts) or None,
        init_lora_weights=False,
    )
    model = get_peft_model(model.requires_grad_(False), asked)
    prepare(model)
    return model


def layers_of_experts(model: Any) -> list[Any]:
    return [m for m in model.modules() if "down_proj" in m._parameters and hasattr(m, "has_gate")]


@torch.no_grad()
def rounded(model: Any, precision: str) -> None:
    """Replaces the experts' weights by the values that `precision` gives them."""
    for layer in layers_of_experts(model):
        for name in experts.names_of(layer):
            weight = getattr(layer, name)
            turn = (lambda w: w.transpose(1, 2)) if layer.is_transposed else (lambda w: w)
            for matrix in turn(weight):
                matrix.copy_(freeze_weight(matrix.contiguous(), precision).dense())


def computed(model: Any) -> list[torch.Tensor]:
    """The logits of one pack of two rows, and all gradients."""
    ids = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(5))
    ends = torch.tensor([0, 40, 60], dtype=torch.int32)
    sides = {f"cu_seq_lens_{end}": ends for end in "qk"} | {"max_length_q": 40, "max_length_k": 40}
    at = torch.cat([torch.arange(40), torch.arange(20)])[None]
    logits = model(input_ids=ids, position_ids=at, use_cache=False, **sides).logits
    logits.log_softmax(-1)[..., 7].sum().backward()
    return [logits, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_quantised_experts_compute_with_the_values_that_they_stand_for(name, adapted, precision):
    held, plain = mixture(name, adapted), mixture(name, adapted)
    before = [x.numel() for layer in layers_of_experts(held) for x in layer.parameters(False)]
    assert experts.quantise(held, precision) == 2
    after = [x.numel() for layer in layers_of_experts(held) for x in layer.parameters(False)]
    assert sum(after) < 0.02 * sum(before)  # biases
    rounded(plain, precision)
    for got, want in zip(computed(held), computed(plain), strict=True):
        assert want.abs().max() > 0
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_fused_layer_in_nf4_is_the_fused_layer_of_the_values_in_nf4(name):
    held, plain = mixture(name), mixture(name)
    layers = accelerate_model(held, "nf4", "cpu", checkpoint_layers=1)["layer"]
    assert layers.startswith("fused, 2 of 2")
    rounded(plain, "nf4")
    for layer in decoder_layers(plain):
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            weight = base_linear(part).weight
            weight.data = freeze_weight(weight.data, "nf4").dense()
    assert accelerate_model(plain, "fp32", "cpu")["layer"].startswith("fused, 2 of 2")
    for got, want in zip(computed(held), computed(plain), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("precision", "most"), [("nf4", 0.5625), ("fp8", 1.07)])
def test_a_weight_takes_the_bytes_that_the_plan_counts(precision, most):
    weight = torch.randn(4, 96, 64)
    held = experts.HeldExperts(weight, precision, transposed=False)
    tensors = [x for x in vars(held.rows).values() if isinstance(x, torch.Tensor)]
    kept = sum(x.nbytes for x in tensors if x.numel() > 64)  # not the codebook
    assert kept <= most * weight.numel()
    turned = experts.HeldExperts(weight.transpose(1, 2), precision, transposed=True)
    assert torch.equal(held.unpack().clone(), turned.unpack())


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_experts_that_are_chosen_are_unpacked_alone(precision):
    held = experts.HeldExperts(torch.randn(6, 96, 64), precision, transposed=False)
    whole, chosen = held.unpack().clone(), torch.tensor([1, 4, 5])
    assert torch.equal(held.unpack(chosen), whole[chosen])


def test_a_width_that_nf4_does_not_take_is_refused():
    model = mixture("qwen3_moe")
    layers_of_experts(model)[0].down_proj.data = torch.randn(4, 64, 40)
    with pytest.raises(ValueError, match="this weight has 40 columns"):
        experts.quantise(model, "nf4")


class Shifted(Fp8Weight):
    def unpack(self) -> torch.Tensor:
        return super().unpack().roll(1, 0)


def test_weights_that_this_device_unpacks_wrongly_are_left_to_plain_torch(monkeypatch, caplog):
    told: list[str] = []
    monkeypatch.setattr(backend, "_without_triton", told)
    monkeypatch.setattr(verify, "_unpacked", set())
    weight, here = torch.randn(400, 64), torch.device("cpu")
    verify.trust_unpacking(freeze_weight(weight, "nf4"), here, "nf4")
    verify.trust_unpacking(Fp8Weight(weight), here, "fp8 as it is")
    assert told == []
    verify.trust_unpacking(Shifted(weight), here, "fp8")
    assert "self-test of unpacking fp8 is off by 1." in told[0] + caplog.text and len(told) == 1
