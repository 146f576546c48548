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
