"""PPO's rewards by token, advantages and losses, pure. Matrices are (answers, longest), with a mask
that is 1 where an answer has a token; what stands behind an answer is 0."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.wire.stages import Ppo

SMALL = 1e-8
MOST_KL_STEP = 0.2  # of kl_coef, in one update
KL_HORIZON = 10_000  # answers after which a KL of twice the target has doubled kl_coef, about


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef times k1 at each token, and an answer's score at its last one: its stop token where
    it has one. `scores` (answers,), `kl` by token the policy's log-probability less the
    reference's."""
    found = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    found[torch.arange(len(found)), last] += scores
    return found


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates: A_t = d_t + gamma lam A_(t+1), where d_t = r_t + gamma
    V_(t+1) - V_t, and the value after an answer's last token is 0."""
    rewards, values = rewards * mask, values * mask
    found = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(after)  # V_(t+1)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        found[:, t] = after
        following = values[:, t]
    return found


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages scaled to a mean of 0 and a deviation of 1 over all tokens of all answers."""
    count = mask.sum()
    apart = (advantages - (advantages * mask).sum() / count) * mask
    spread = (apart.square().sum() / (count - 1).clamp_min(1)).sqrt()
    return apart / (spread + SMALL)


def policy_loss(settings: Ppo, policy: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """By token: -min(w A, clip(w) A), w the probability as it is over what it was."""
    ratio = (policy - old).exp()
    clipped = ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(settings: Ppo, values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    """By token: half the larger square of the error of V, and of V held near what it was."""
    near = old + (values - old).clamp(-settings.cliprange_value, settings.cliprange_value)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def next_kl_coef(settings: Ppo, kl_coef: float, kl: float, answers: int) -> float:
    """kl_coef after `answers` whose KL, in nats an answer, was `kl`: led to target_kl."""
    if settings.target_kl is None:
        return kl_coef
    off = max(-MOST_KL_STEP, min(MOST_KL_STEP, kl / settings.target_kl - 1))
    return kl_coef * (1 + off * answers / KL_HORIZON)
