"""The fused layer against transformers and PEFT, in fp32 on the CPU, where it runs on the eager
twins."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trainer.kernels import reference
from trainer.kernels.attention import register
from trainer.kernels.patch import accelerate_model, build_layer
from trainer.kernels.verify import OTHERWISE, TOLERANCE, layer_error
from trainer.model.load import checkpoint_first
from trainer.model.loss import target_loss_sum
from trainer.model.parts import decoder_layers

DOCUMENTS = [7, 1, 20, 13]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def build(
    kind: str, kv_heads: int, targets: list[str] | str, r: int = 4, dropout: float = 0.0
) -> torch.nn.Module:
    torch.manual_seed(3)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**SIZES, num_key_value_heads=kv_heads, initializer_range=0.2)
        )
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(**SIZES, num_key_value_heads=kv_heads, initializer_range=0.2)
        )
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    register()
    model.set_attn_implementation("milktea")
    model = get_peft_model(
        model,
        LoraConfig(
            r=r, lora_alpha=6, lora_dropout=dropout, target_modules=targets, init_lora_weights=False
        ),
    )
    return model


def batch() -> dict:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 96, (1, sum(DOCUMENTS)), generator=generator)
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    longest = max(DOCUMENTS)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def run(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = batch()
    labels = inputs["input_ids"].roll(-1, 1)
    labels[:, ::3] = -100
    inner = model.get_base_model()
    hidden = inner.model(**inputs, use_cache=False).last_hidden_state
    loss = target_loss_sum(hidden, inner.lm_head.weight, labels)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpoint_layers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "kv_heads", "targets"),
    [
        ("llama", 2, "all-linear"),
        ("llama", 1, "all-linear"),
        ("qwen2", 1, ["q_proj", "v_proj"]),
        ("llama", 2, ["down_proj", "up_proj", "o_proj"]),
    ],
)
def test_the_fused_layer_gives_the_loss_and_gradients_of_transformers_and_peft(
    kind, kv_heads, targets, checkpoint_layers
):
    plain = build(kind, kv_heads, targets)
    fused = copy.deepcopy(plain)
    names = accelerate_model(fused, "fp32", "cpu", checkpoint_layers=checkpoint_layers)
    assert names["layer"].startswith("fused, 3 of 3")
    want, want_grads = run(plain)
    got, grads = run(fused)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(want_grads) > 0
    for name, grad in want_grads.items():
        assert grad.abs().max() > 0
        assert (grads[name] - grad).norm() < 1e-5 * grad.norm(), name


def test_layers_that_are_not_fused_are_recomputed_when_that_was_asked_for():
    """On a GPU `load` asks for it: without it LoRA with dropout took 55 GiB instead of 9."""
    model = build("llama", 2, "all-linear", dropout=0.1)
    assert accelerate_model(model, "fp32", "cpu", checkpoint_layers=2)["layer"] == "transformers"
    checkpoint_first(model, 2)
    turns = [0, 0, 0]
    for n, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, n=n: turns.__setitem__(n, turns[n] + 1))
    run(model)
    assert turns == [2, 2, 1]

    fused = build("llama", 2, "all-linear")
    accelerate_model(fused, "fp32", "cpu", checkpoint_layers=2)
    before = [layer.forward for layer in decoder_layers(fused)]
    checkpoint_first(fused, 2)
    # they recompute by themselves
    assert [layer.forward for layer in decoder_layers(fused)] == before


def test_the_fused_layer_follows_an_optimizer_step():
    plain = build("llama", 1, "all-linear")
    fused = copy.deepcopy(plain)
    accelerate_model(fused, "fp32", "cpu")
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            losses[-1].append(float(run(model)[0]))
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_disabled_adapter_is_disabled_in_the_fused_layer_too():
    model = build("llama", 2, "all-linear")
    accelerate_model(model, "fp32", "cpu")
    with torch.no_grad(), model.disable_adapter():
        got = model.get_base_model().model(**batch(), use_cache=False).last_hidden_state
        want = model.unload().model(**batch(), use_cache=False).last_hidden_state
    torch.testing.assert_close(got, want)


def test_a_second_backward_through_the_same_graph_is_refused_rather_than_wrong():
    model = build("llama", 2, "all-linear")
    accelerate_model(model, "fp32", "cpu")
    hidden = model.get_base_model().model(**batch(), use_cache=False).last_hidden_state
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_quantised_base_computes_the_same_packed_and_one_document_at_a_time(precision):
    model = build("llama", 1, "all-linear")
    accelerate_model(model, precision, "cpu")
    inner, inputs = model.get_base_model().model, batch()
    with torch.no_grad():
        packed = inner(**inputs, use_cache=False).last_hidden_state[0]
        start = 0
        for n in DOCUMENTS:
            alone = inner(
                input_ids=inputs["input_ids"][:, start : start + n], use_cache=False
            ).last_hidden_state[0]
            # an FP8 code may round the other way
            assert (packed[start : start + n] - alone).norm() < 0.05 * alone.norm()
            start += n


@pytest.mark.parametrize(("precision", "bound"), [("fp8", 0.06), ("nf4", 0.15)])
def test_gradients_over_a_quantised_base_are_near_the_exact_ones(precision, bound):
    plain = build("llama", 1, "all-linear")
    quantised = copy.deepcopy(plain)
    accelerate_model(quantised, precision, "cpu")
    (want, want_grads), (got, grads) = run(plain), run(quantised)
    assert float(got) == pytest.approx(float(want), rel=bound)
    a, b = (torch.cat([g[n].flatten() for n in want_grads]) for g in (grads, want_grads))
    assert torch.cosine_similarity(a, b, 0) > 1 - 4 * bound


def test_layers_that_do_not_fit_are_left_to_transformers_and_named():
    model = build("llama", 2, "all-linear", r=4)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    names = accelerate_model(model, "fp32", "cpu")
    assert names["layer"] == "transformers"
    assert "3 layers: lora_dropout is not 0" in names["not_fused"]


@pytest.mark.parametrize("precision", ["fp32", "fp8", "nf4"])
@pytest.mark.parametrize(
    "broken",
    [
        None,
        "norm_forward",
        "norm_backward",
        "rope_forward_",
        "rope_backward",
        "swiglu_forward",
        "swiglu_backward",
        "cast_outer",
        "residual_add",
        "cross_entropy_rows",
        "log_prob_rows",
    ],
)
def test_the_self_test_catches_any_kernel_that_is_wrong(broken, precision):
    """Fault injection: each operation in turn gives numbers of which one in eight is off by a
    half."""

    def spoil(result):
        if isinstance(result, torch.Tensor):
            if result.dtype.is_floating_point and result.dtype != torch.float8_e4m3fn:
                result.view(-1)[::8] *= 1.5
            return result
        return tuple(spoil(x) for x in result) if isinstance(result, tuple) else result

    def wrong(*args, **kwargs):
        result = getattr(reference, broken)(*args, **kwargs)
        return spoil(args[0] if result is None else result)  # None: it worked in place

    model = build("llama", 1, "all-linear")
    layer = build_layer(model.get_base_model().model.layers[0], precision, reference, False, False)
    names = [
        n
        for n in vars(reference)
        if n.islower() and callable(getattr(reference, n)) and not n.startswith("_")
    ]
    layer.ops = SimpleNamespace(
        **{n: getattr(reference, n) for n in names} | ({broken: wrong} if broken else {})
    )
    error = layer_error(layer)
    limit = TOLERANCE.get(precision, OTHERWISE)
    assert error < limit if broken is None else error > limit


# -- more than one adapter, more than one forward --------------------------------------------------


def two_adapters() -> tuple[Any, dict[str, Any]]:
    """A fused model with the adapters "default" (rank 4) and "reward" (rank 20), and a pack."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    register()
    base = LlamaForCausalLM._from_config(settings, attn_implementation="milktea")
    model = get_peft_model(base.requires_grad_(False), LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("reward", LoraConfig(r=20, target_modules="all-linear"))
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2, generator=g)
    model.set_adapter("default")
    ends = torch.tensor([0, 7, 20], dtype=torch.int32)
    batch = {
        "input_ids": torch.randint(0, 64, (1, 20), generator=g),
        "position_ids": torch.cat([torch.arange(7), torch.arange(13)])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 13,
        "max_length_k": 13,
        "use_cache": False,
    }
    return model, batch


def test_each_forward_looks_up_which_adapter_is_active():
    """Also one of another rank, and one that is switched off; plain transformers is the judge."""
    model, batch = two_adapters()
    plain = copy.deepcopy(model)
    accelerate_model(model, "fp32", "cpu")
    for name in ("default", "reward", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_a_forward_that_is_overtaken_before_its_backward_raises():
    model, batch = two_adapters()
    accelerate_model(model, "fp32", "cpu")
    loss = model(**batch).logits.sum()
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    with pytest.raises(RuntimeError, match="another forward pass came between"):
        loss.backward()
    model(**batch).logits.sum().backward()


def test_gradients_are_those_of_the_adapter_that_the_forward_used():
    model, batch = two_adapters()
    plain = copy.deepcopy(model)
    accelerate_model(model, "fp32", "cpu")
    for m in (model, plain):
        m.set_adapter("reward")
        m(**batch).logits.square().sum().backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) and all("reward" in n for n in found)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)


def test_rows_that_no_adapter_fills_are_zero_again_after_the_self_test():
    """The self-test fills the whole buffers with random numbers."""
    model, batch = two_adapters()
    plain = copy.deepcopy(model)
    accelerate_model(model, "fp32", "cpu")
    for group in (g for f in model.get_base_model().model.fast_layers for g in f.groups):
        group.a.fill_(3.0)
        group.b.fill_(3.0)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
