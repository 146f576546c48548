"""The fused layer of each family, on its eager twins, against stock transformers (eager) and PEFT,
in fp32 on the CPU, with rows longer than any window."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, WINDOW
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import families
from trainer.data import batch
from trainer.data.sharing import Borrowed
from trainer.data.tokenised import Rows
from trainer.kernels.attention import register
from trainer.kernels.base_parts import BaseParts
from trainer.kernels.patch import accelerate_model
from trainer.kernels.verify import stock_error
from trainer.model.forward import target_loss
from trainer.model.load import prepare
from trainer.model.parts import decoder_layers

DOCUMENTS = [40, 1, 21, 33]
WIDE = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
FUSED = [
    *("llama", "llama_tied", "mistral_window", "mistral", "qwen2", "qwen2_window", "qwen3"),
    *("gemma", "gemma2", "gemma3", "phi3", "phi3_window", "glm", "glm4", "qwen3_moe", "gpt_oss"),
    *("gemma4", "gemma4_shared", "qwen3_5", "qwen3_5_moe"),
]


def build(name: str, attention: str) -> Any:
    kind, settings = ARCHITECTURES[name.removesuffix("_shared")]
    more = dict(WIDE)
    if name.startswith("gemma4"):
        more |= {"global_head_dim": 64}
    if name == "gemma4_shared":  # keys and values of one projection
        more |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    if name.startswith("qwen3_5"):
        more |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    if name.startswith(("llama_tied", "mistral", "qwen2", "phi3")):
        more |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        more.pop("head_dim")
    config = AutoConfig.for_model(kind, **{**settings, **more})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for key, p in model.named_parameters():
        if key.endswith(("bias", "sinks")) or "norm" in key:
            torch.nn.init.normal_(p, 0.0 if p.mean() == 0 else 1.0, 0.3)
    for layer in model.model.layers:
        if hasattr(layer, "layer_scalar"):
            layer.layer_scalar.fill_(0.7)
    model.family = families.read(model.config.to_dict())
    adapted = model.family.all_linear()
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(adapted.modules),
        target_parameters=list(adapted.experts) or None,
        init_lora_weights=False,
    )
    return get_peft_model(model.requires_grad_(False), settings)


def rows() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 320, (1, n), generator=g) for n in DOCUMENTS]


def shifted(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return labels


def alone(model: Any) -> torch.Tensor:
    """The summed loss of each row by itself, as transformers computes it."""
    total = torch.zeros(())
    for ids in rows():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        total = total + torch.nn.functional.cross_entropy(
            logits[0], shifted(ids)[0], reduction="sum", ignore_index=-100
        )
    return total


def packed(model: Any) -> torch.Tensor:
    given = rows()
    labels = torch.cat([shifted(ids) for ids in given], 1)
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    sides = {f"cu_seq_lens_{end}": ends for end in "qk"}
    sides |= {f"max_length_{end}": max(DOCUMENTS) for end in "qk"}
    batch = {
        "input_ids": torch.cat(given, 1),
        "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
        "labels": labels,
        "targets_at": (labels.flatten() >= 0).nonzero().flatten(),
    }
    return target_loss(model, batch | sides)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FUSED)
def test_a_pack_through_the_fused_layer_is_its_rows_alone_in_transformers_and_peft(name):
    assert max(DOCUMENTS) > 2 * WINDOW
    stock = build(name, "eager")
    fused = build(name, register())
    fused.load_state_dict(stock.state_dict())
    prepare(fused)
    names = accelerate_model(fused, "fp32", "cpu")
    layers = stock.config.get_text_config().num_hidden_layers
    assert names["layer"] == f"fused, {layers} of {layers}, eager twin", names
    want, got = alone(stock), packed(fused)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    want.backward()
    got.backward()
    found = gradients(fused)
    for key, grad in gradients(stock).items():
        assert grad.abs().max() > 0
        assert (found[key] - grad).norm() < 1e-3 * grad.norm(), key


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "gpt_oss", "qwen3_5"])
def test_layers_that_gather_their_weights_compute_what_whole_ones_do_pass_after_pass(name):
    whole = build(name, register())
    gathering = copy.deepcopy(whole)
    parts = BaseParts(torch.device("cpu"), rank=0, world=1)
    for model in (whole, gathering):
        prepare(model)
        layers = len(decoder_layers(model))
        more = {"checkpoint_layers": layers, "parts": parts if model is gathering else None}
        assert accelerate_model(model, "fp32", "cpu", **more)["layer"].startswith("fused")
    parts.attach(decoder_layers(gathering))
    want = packed(whole)
    want.backward()
    for _ in range(2):
        gathering.zero_grad()
        got = packed(gathering)
        got.backward()
        torch.testing.assert_close(got, want)
        for (key, a), b in zip(
            gradients(gathering).items(), gradients(whole).values(), strict=True
        ):
            torch.testing.assert_close(a, b, msg=key)
        with torch.no_grad():
            torch.testing.assert_close(packed(gathering), want)
    still = [
        n
        for n, p in decoder_layers(gathering).named_parameters()
        if not p.requires_grad and p.numel() and p.dim() > 1 and "conv" not in n
    ]
    assert not still  # between two passes no layer holds its matrices


def groups() -> tuple[Rows, list[Borrowed]]:
    """Three answers to a prompt, two to another one, and a row by itself; the prompts are longer
    than any window."""
    g, ids, borrowed = torch.Generator().manual_seed(5), [], []
    for prompt, answers in ((41, [9, 3, 17]), (20, [6, 11]), (0, [5])):
        first, said = len(ids), torch.randint(3, 320, (prompt,), generator=g)
        for n in answers:
            ids.append(torch.cat([said, torch.randint(3, 320, (n + 1,), generator=g)]).numpy())
            borrowed.append(Borrowed(first, prompt if len(ids) > first + 1 else 0))
    starts = np.cumsum([0, *map(len, ids)])
    firsts = [max(8, prompt) for prompt in (41, 41, 41, 20, 20, 0)]
    marks = np.concatenate([np.arange(len(x)) > n for x, n in zip(ids, firsts, strict=True)])
    told = [""] * len(ids)
    joined = np.concatenate(ids).astype(np.int32)
    return Rows(joined, marks, starts, np.ones(len(ids), bool), told), borrowed


@pytest.mark.parametrize(
    ("name", "fused"),
    [("llama", True), ("gemma2", True), ("gpt_oss", True), ("gemma2", False), ("gpt_oss", False)],
)
def test_rows_that_share_their_beginning_are_the_rows_alone_in_transformers(name, fused):
    stock, shared = build(name, "eager"), build(name, register())
    shared.load_state_dict(stock.state_dict())
    prepare(shared)
    if fused:
        accelerate_model(shared, "fp32", "cpu", checkpoint_layers=1)
    given, borrowed = groups()
    one = batch.packed(given, range(len(given)), torch.device("cpu"), borrowed)
    assert one["input_ids"].shape[1] == given.starts[-1] - 2 * 41 - 20
    got, want = target_loss(shared, one), torch.zeros(())
    for a, b in pairwise(given.starts):
        ids, marks = (torch.from_numpy(x[a:b]) for x in (given.ids, given.trained))
        logits = stock(input_ids=ids.long()[None], use_cache=False).logits[0].float()
        labels = torch.where(marks, ids.long(), -100)[1:]
        want = want + torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    want.backward()
    got.backward()
    found = gradients(shared)
    for key, grad in gradients(stock).items():
        assert (found[key] - grad).norm() < 1e-5 * grad.norm(), key


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "glm4"])
def test_a_layer_that_is_checkpointed_computes_the_same(name):
    model = build(name, register())
    again = copy.deepcopy(model)
    accelerate_model(model, "fp32", "cpu")
    accelerate_model(again, "fp32", "cpu", checkpoint_layers=1)
    losses = [packed(m) for m in (model, again)]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    found = gradients(again)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(found[key], grad)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "glm4"])
def test_the_start_up_check_against_transformers_sees_a_row_that_was_read_wrongly(name):
    from trainer.kernels import reference
    from trainer.kernels.patch import build_layer, inner_model

    layer = inner_model(build(name, register())).layers[0]
    fast = build_layer(layer, "fp32", reference, False, False)
    assert stock_error(layer, fast) < 1e-4
    fast.norm2 = fast.norm2._replace(weight=fast.norm2.weight + 1.0)
    assert stock_error(layer, fast) > 0.03
