"""The forward pass of a batch: hidden states, and the losses of its target tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from trainer.families import Family
from trainer.model.balance import Balance
from trainer.model.loss import chunks, log_probs_of, target_loss_sum
from trainer.model.parts import causal, family_of, name_of_cache
from trainer.model.prompts import prompt_of, run_with

NOT_FOR_THE_MODEL = ("labels", "rows", "targets_at")  # and what a stage adds, by "stage/..."


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The entries of a micro-batch that the model's forward takes."""
    return {
        k: v for k, v in batch.items() if k not in NOT_FOR_THE_MODEL and not k.startswith("stage/")
    }


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """(B, T, H) after the final norm, before the head; from the text tower of a model with
    several."""
    states: Tensor = decoded(model, **inputs).last_hidden_state
    return states


def decoded(model: nn.Module, **inputs: Any) -> Any:
    """The outputs of the decoder layers, before the head."""
    inner = causal(model)
    tower = family_of(model).tower
    if tower:
        core = inner.get_submodule(tower)
    else:
        core = getattr(inner, inner.base_model_prefix, None) or inner.model
    prompt = prompt_of(model)
    if prompt is not None:
        return run_with(core, prompt, name_of_cache(inner), inputs, use_cache=False)
    return core(**inputs, use_cache=False)


def target_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed cross-entropy over the batch's target tokens, fp32 scalar. Logits are computed at
    target positions only. A family whose row does not say how logits are made uses the model's own
    forward."""
    inputs = model_inputs(batch)
    inner, family = causal(model), family_of(model)
    balance: Balance | None = getattr(inner, "balance", None)
    asked = {} if balance is None else {"output_router_logits": True}
    at = batch["targets_at"]
    made = (inner if family.own_logits else partial(decoded, model))(**inputs, **asked)
    loss = _cross_entropy(inner, family, made, batch["labels"], at)
    if balance is not None:
        loss = loss + balance.added(made.router_logits, inputs.get("attention_mask"), len(at))
    return loss


def _head(inner: Any) -> Any:
    """The layer that makes logits; its trained copy where it is trained whole beside an adapter."""
    head = inner.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters:
        return head.modules_to_save[head.active_adapters[0]]
    return head


def _cross_entropy(inner: Any, family: Family, made: Any, labels: Tensor, at: Tensor) -> Tensor:
    """Cross-entropy summed over the targets. `made` is what the layers return or, where the
    family's own forward makes logits, what that returns. labels (B, T) are already shifted."""
    if family.own_logits:
        logits = made.logits.flatten(0, 1).index_select(0, at)
    else:
        head = _head(inner)
        scale, cap = logit_rules(inner, family)
        hidden = made.last_hidden_state  # (B, T, H)
        if type(head) is nn.Linear and head.bias is None:
            weight = head.weight.to(hidden.dtype)  # one that trains is fp32
            return target_loss_sum(hidden, weight, labels, at, scale, cap)
        logits = head(hidden.flatten(0, 1).index_select(0, at)).float() * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return nn.functional.cross_entropy(
        logits.float(), labels.flatten().index_select(0, at), reduction="sum"
    )


def target_log_probs(
    model: nn.Module, batch: dict[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log p of each target token of the batch, entropy of the distribution there), fp32 (targets,)
    each, in the order of `targets_at`. Logits are computed at target positions only, and saved only
    where the family's own forward makes them."""
    inner, family = causal(model), family_of(model)
    labels, at, inputs = batch["labels"], batch["targets_at"], model_inputs(batch)
    head = inner.get_output_embeddings()
    if not family.own_logits and type(head) is nn.Linear and head.bias is None:
        hidden = hidden_states(model, **inputs)
        rules = logit_rules(inner, family)
        return log_probs_of(hidden, head.weight, labels, at, *rules, temperature)
    if family.own_logits:
        logits = inner(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, at)
    else:
        logits = head(hidden_states(model, **inputs).flatten(0, 1).index_select(0, at))
    every = (logits.float() / temperature).log_softmax(-1)
    chosen = every.gather(1, labels.flatten().index_select(0, at)[:, None])[:, 0]
    return chosen, -(every.detach().exp() * every.detach()).sum(-1)


def target_facts(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(summed cross-entropy, number of targets that are the most likely token) of the batch, fp64
    (2,); without gradients, and without the balancing loss of a mixture's experts."""
    inner, family = causal(model), family_of(model)
    labels, at, inputs = batch["labels"], batch["targets_at"], model_inputs(batch)
    wanted = labels.flatten().index_select(0, at)
    head, made = _head(inner), None
    if family.own_logits:
        made = inner(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, at)
    else:
        hidden = hidden_states(model, **inputs).flatten(0, 1).index_select(0, at)
    scale, cap = (1.0, None) if family.own_logits else logit_rules(inner, family)
    found = torch.zeros(2, dtype=torch.float64, device=labels.device)
    vocabulary = inner.config.get_text_config().vocab_size
    for part in chunks(len(at), vocabulary):
        logits = head(hidden[part].to(head.weight.dtype)) if made is None else made[part]
        logits = logits.float() * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        found[0] += nn.functional.cross_entropy(logits, wanted[part], reduction="sum")
        found[1] += (logits.argmax(-1) == wanted[part]).sum()
    return found


def logit_rules(inner: nn.Module, family: Family) -> tuple[float, float | None]:
    """(factor of the logits, their soft cap or None)."""
    config: Any = inner.config
    text = config.get_text_config()
    multiply, divide, cap = (
        getattr(text, family.row[key], None) if family.row[key] else None
        for key in ("multiply", "divide", "cap")
    )
    scale = (1.0 if multiply is None else multiply) / (divide or 1.0)
    return float(scale), None if cap is None else float(cap)
