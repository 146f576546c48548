"""The chunked loss against torch's own cross-entropy, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trainer.model import loss as module
from trainer.model.loss import target_loss_sum


@pytest.fixture
def case():
    torch.manual_seed(2)
    hidden, head = torch.randn(1, 53, 24), torch.randn(300, 24)
    labels = torch.randint(0, 300, (1, 53))
    labels[0, torch.rand(53) < 0.4] = -100
    return hidden, head, labels


def oracle(hidden, head, labels):
    return functional.cross_entropy(
        (hidden @ head.t()).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("chunk", [1, 16 * 300, 1 << 26])
@pytest.mark.parametrize("chosen", [False, True])
def test_loss_and_gradient_are_those_of_torch(case, chunk, chosen, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", chunk)
    hidden, head, labels = case
    at = (labels.flatten() >= 0).nonzero().flatten() if chosen else None
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    got, want = target_loss_sum(ours, head, labels, at), oracle(theirs, head, labels)
    torch.testing.assert_close(got, want)
    (got * 0.37).backward()
    (want * 0.37).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad[labels < 0] == 0).all()


def test_a_head_that_trains_gets_its_gradient(case):
    hidden, head, labels = case
    ours, theirs = (head.clone().requires_grad_() for _ in range(2))
    target_loss_sum(hidden, ours, labels).backward()
    oracle(hidden, theirs, labels).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_bf16_states_give_an_fp32_loss(case):
    hidden, head, labels = case
    got = target_loss_sum(hidden.bfloat16(), head.bfloat16(), labels)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(oracle(hidden, head, labels)), rel=0.01)


def test_without_targets_the_loss_is_zero_and_so_is_its_gradient(case):
    hidden, head, labels = case
    hidden = hidden.clone().requires_grad_()
    got = target_loss_sum(hidden, head, torch.full_like(labels, -100))
    got.backward()
    assert got == 0 and hidden.grad.abs().max() == 0


def test_labels_of_another_length_are_refused_with_both_numbers(case):
    hidden, head, labels = case
    with pytest.raises(ValueError, match="53 hidden states but 50 labels"):
        target_loss_sum(hidden, head, labels[:, :50])


@pytest.mark.parametrize("cap", [None, 5.0])
def test_log_probs_with_a_weight_for_each_target_equal_the_full_log_softmax(
    monkeypatch: pytest.MonkeyPatch, cap: float | None
) -> None:
    """In chunks of 16 rows, so that there are several."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 16 * 50)
    dice = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 70, 24, generator=dice, requires_grad=True)
    head = torch.randn(50, 24, generator=dice)
    labels = torch.randint(0, 50, (1, 70), generator=dice)
    at = torch.arange(3, 68)
    weights = torch.randn(len(at), generator=dice)
    found, entropies = module.log_probs_of(hidden, head, labels, at, 0.5, cap)
    [ours] = torch.autograd.grad((found * weights).sum(), hidden)
    logits = hidden[0, at] @ head.t() * 0.5
    every = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    expected = every.gather(1, labels[0, at][:, None])[:, 0]
    [theirs] = torch.autograd.grad((expected * weights).sum(), hidden)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(entropies, -(every.exp() * every).sum(-1), atol=1e-5)
    assert not entropies.requires_grad
