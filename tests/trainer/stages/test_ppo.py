"""PPO: its arithmetic against plain loops, each trap of the field, roles on one base, resume."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import adapter_sha256, events_of, finish, manifest_of, start
from torch import Tensor

from trainer.data.errors import InvalidJob
from trainer.loop import checkpoint
from trainer.loop.guards import Stopped
from trainer.loop.ranks import StopSignal
from trainer.loop.replicas import Replicas
from trainer.loop.step import Loop
from trainer.model import decode
from trainer.model.decode import Answer
from trainer.result import adapter
from trainer.stages import ppo, rm, rollout
from trainer.stages.ppo_losses import (
    gae,
    next_kl_coef,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)
from trainer.train import run_job
from trainer.wire.job import Job
from trainer.wire.stages import Ppo

Make = Callable[..., Path]
HOST = torch.device("cpu")
# a tiny random model begins an answer with any of 320 tokens: half of them are wanted
HALF = {"kind": "format", "regex": "^[\\x00-N]"}
ROWS = [{"instruction": f"Say number {n}", "output": f"it is {n}"} for n in range(8)]
PAIRS = [
    {"instruction": f"Say number {n}", "chosen": f"it is {n}", "rejected": "no " * (1 + n % 4)}
    for n in range(16)
]
SETTINGS: dict[str, Any] = {
    "training": {"batch_size": 4, "num_train_epochs": 2, "learning_rate": 2e-2}
}
SECTION: dict[str, Any] = {"rewards": [HALF], "max_completion_length": 3}


def loaded(job: Path) -> ppo.Stage:
    stage = ppo.Stage(Job.model_validate_json(job.read_bytes()), job.parent)
    stage.load(Replicas(StopSignal(), HOST))
    return stage


def steps(job: Path) -> list[dict[str, Any]]:
    return [e for e in events_of(job) if e["event"] == "step"]


def some(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers, numbers, mask) of answers of 5, 1 and 3 tokens; what stands behind is not 0."""
    dice = torch.Generator().manual_seed(seed)
    mask = (torch.arange(5) < torch.tensor([5, 1, 3])[:, None]).double()
    first, second = (torch.randn(3, 5, generator=dice, dtype=torch.float64) for _ in range(2))
    return first, second, mask


# -- the arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_those_of_a_quadratic_loop(gamma: float, lam: float) -> None:
    rewards, values, mask = some()
    found = gae(rewards, values, mask, gamma, lam)
    for k, n in enumerate([5, 1, 3]):
        value = [*values[k, :n].tolist(), 0.0]  # nothing comes after the last token
        deltas = [float(rewards[k, t]) + gamma * value[t + 1] - value[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, n))
            assert float(found[k, t]) == pytest.approx(expected, abs=1e-12)
        assert not found[k, n:].any(), "behind an answer there is no advantage"


def test_what_stands_behind_an_answer_changes_nothing() -> None:
    rewards, values, mask = some()
    expected = gae(rewards, values, mask, 1.0, 0.95)
    noise = 100 * (1 - mask)
    assert torch.equal(gae(rewards + noise, values + noise, mask, 1.0, 0.95), expected)


def test_the_score_stands_at_the_last_token_and_the_kl_at_each() -> None:
    _, kl, mask = some()
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = token_rewards(scores, kl, mask, 0.1)
    assert found[0, 4] == pytest.approx(1.0 - 0.1 * float(kl[0, 4]))
    assert found[1, 0] == pytest.approx(2.0 - 0.1 * float(kl[1, 0]))
    assert found[2, 2] == pytest.approx(3.0 - 0.1 * float(kl[2, 2]))
    assert not found[1, 1:].any() and not found[2, 3:].any()
    assert found.sum(1).tolist() == pytest.approx((scores - 0.1 * (kl * mask).sum(1)).tolist())


def test_advantages_are_whitened_over_all_tokens_of_all_answers() -> None:
    advantages, _, mask = some()
    found = whitened(advantages, mask)
    tokens = found[mask.bool()]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-12)
    assert float(tokens.std()) == pytest.approx(1, abs=1e-6)
    assert not found[~mask.bool()].any()


def test_the_policy_gains_nothing_beyond_the_clip() -> None:
    old = torch.zeros(4)
    policy = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = policy_loss(Ppo(), policy, old, advantages)
    assert loss.tolist() == pytest.approx([-1.2, -math.exp(-0.5), math.exp(0.5), 0.8])
    loss.sum().backward()
    assert (policy.grad != 0).tolist() == [False, True, True, False]  # type: ignore[union-attr]


def test_the_value_is_held_near_what_it_was() -> None:
    old, returns = torch.zeros(3), torch.tensor([2.0, 2.0, 0.1])
    values = torch.tensor([1.0, 0.2, 1.0]).requires_grad_()
    loss = value_loss(Ppo(), values, old, returns)
    assert loss.tolist() == pytest.approx([0.5 * 1.5**2, 0.5 * 1.8**2, 0.5 * 0.9**2])
    loss.sum().backward()
    assert (values.grad != 0).tolist() == [False, True, True]  # type: ignore[union-attr]


def test_the_weight_of_the_kl_is_led_to_its_target() -> None:
    settings = Ppo(target_kl=6.0)
    assert next_kl_coef(settings, 0.1, 6.0, 100) == 0.1
    assert next_kl_coef(settings, 0.1, 60.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.01))
    assert next_kl_coef(settings, 0.1, 0.0, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.01))
    assert next_kl_coef(Ppo(), 0.1, 60.0, 100) == 0.1


# -- on a model ----------------------------------------------------------------------------------


def test_before_the_first_step_every_ratio_is_1_and_every_kl_0(stage_run: Make) -> None:
    """Sampled at a temperature, scored at the same: otherwise the KL is negative from the start."""
    stage = loaded(stage_run("ppo", ROWS, ppo=SECTION | {"temperature": 1.7}, **SETTINGS))
    work = stage.prepare(0, stage.batches(0))
    assert stage.rollout is not None
    made, mask = stage.rollout.made, stage.rollout.mask
    assert torch.equal(made["old"], made["reference"])
    assert float((made["old"] - made["said"]).abs().max()) < 1e-4
    assert not made["kl"].any()
    # with a KL of 0 and values of 0, returns are the score, seen from each token through lam
    score = made["reward"] - (~made["ended"]).double()
    last = stage.rollout.lengths - 1
    assert torch.allclose(made["returns"][torch.arange(4), last], score)
    assert not made["returns"][mask == 0].any() and not made["old_values"][mask == 0].any()
    roles = [m["stage/role"] for m in work.micro]
    assert roles == ["default", "value"], "a backward pass never waits behind another forward pass"
    loss, sums = stage.loss(0, work.micro[0])
    assert float(sums["clipped"]) == 0 and float(loss.detach()) == pytest.approx(0, abs=1e-4)


def test_an_answer_without_its_stop_token_scores_less(stage_run: Make) -> None:
    stage = loaded(stage_run("ppo", ROWS, ppo=SECTION | {"missing_eos_penalty": 0.7}, **SETTINGS))
    stop = stage.data.stop_id
    answers = [Answer([5, 6, stop], [-1.0] * 3, True), Answer([5, 6, 7], [-1.0] * 3, False)]
    made = rollout.Rollout(0, stage.as_rows(stage.data.rows, [0, 1], answers))
    made.made = {"reward": torch.zeros(2).double(), "ended": torch.tensor([True, False])}
    assert stage._scores(made).tolist() == [0.0, -0.7]
    micro = stage.micro(made.rows, [0, 1])[0]
    ids = micro["input_ids"].flatten()[micro["stage/ends"]].tolist()
    assert sorted(ids) == sorted([stop, 7]), "the score is read at the last token of the answer"


def test_only_the_policy_is_saved_and_the_value_learns_too(
    stage_run: Make, every_step_told: None
) -> None:
    once = {"training": SETTINGS["training"] | {"num_train_epochs": 1}}
    job = stage_run("ppo", ROWS, ppo=SECTION | {"num_mini_batches": 2}, **once)
    assert run_job(job) == 0
    told = steps(job)
    assert len(told) == 8, "two batches, each with two passes of two steps"
    assert all(e["drift"] < 1e-4 for e in told if e["step"] % 4 == 1)
    assert told[0]["kl"] == 0.0 and told[-1]["explained_variance"] != told[0]["explained_variance"]
    names = manifest_of(job)["tensors"]
    assert names and not any("value" in n or "head" in n for n in names)


def test_in_the_warm_up_the_value_learns_alone(stage_run: Make) -> None:
    stage = loaded(stage_run("ppo", ROWS, ppo=SECTION | {"value_warmup": 1}, **SETTINGS))
    work = stage.prepare(0, stage.batches(0))
    assert {m["stage/role"] for m in work.micro} == {"value"}
    policy, value = stage.rates(0)
    assert policy == 0.0 and value > 0
    later, three = stage.rates(2)
    assert three == pytest.approx(3 * later)
    assert {m["stage/role"] for m in stage.prepare(2, stage.batches(2)).micro} == {
        "default",
        "value",
    }


def test_dropout_is_refused_where_the_model_learns_from_itself(stage_run: Make) -> None:
    with pytest.raises(InvalidJob, match="dropout blurs"):
        loaded(stage_run("ppo", ROWS, ppo=SECTION, lora={"lora_dropout": 0.1}, **SETTINGS))


@pytest.mark.slow
def test_a_reward_model_of_the_same_start_judges_and_begins_the_value(stage_run: Make) -> None:
    short = {"training": {"batch_size": 8, "max_steps": 1, "learning_rate": 1e-2}}
    policy = stage_run("sft", ROWS, **short)
    assert run_job(policy) == 0
    judge = stage_run("rm", PAIRS, start=policy, **short)
    assert run_job(judge) == 0
    section = {"rewards": [{"kind": "model", "path": "judge"}], "max_completion_length": 3}
    with pytest.raises(InvalidJob, match=r"trained after sft .*, the policy starts from the base"):
        loaded(stage_run("ppo", ROWS, judge=judge, ppo=section, **SETTINGS))
    with pytest.raises(ValueError, match="come together"):
        loaded(stage_run("ppo", ROWS, start=policy, ppo=section, **SETTINGS))
    once = {"training": SETTINGS["training"] | {"max_steps": 1}}
    job = stage_run("ppo", ROWS, start=policy, judge=judge, ppo=section, **once)
    stage = loaded(job)
    again = stage_run("rm", PAIRS, start=judge, **SETTINGS)
    expected = rm.Stage(Job.model_validate_json(again.read_bytes()), again.parent)
    expected.load(Replicas(StopSignal(), HOST))
    rows = expected.data.rows
    micro = expected.micro(rows, range(4))[0]
    with torch.no_grad():
        said = rm.scores(expected.model, micro)
        found = stage._scored(rows)[list(micro["stage/numbers"])]
        values = stage.values(micro)
    assert torch.allclose(found, said.double(), atol=1e-6)
    assert float(said.std()) > 0 and values.abs().max() > 0
    for name, parameter in stage.model.named_parameters():
        assert parameter.requires_grad == (".default." in name or "value" in name), name
    assert run_job(job) == 0
    links = manifest_of(job)["chain"]["links"]
    assert [(x["stage"], x["how"]) for x in links] == [("sft", "new"), ("ppo", "continue")]
    assert manifest_of(job)["judge"]["sha256"] == stage.job.judge.sha256  # type: ignore[union-attr]


def test_a_stage_adds_its_numbers_and_stops_where_every_answer_fails(stage_run: Make) -> None:
    rule: dict[str, Any] = {"kind": "python", "path": "reward.py", "weight": 2.0}
    told = {"path": "reward.py", "name": "r.py", "sha256": "0" * 64, "size_bytes": 1}
    section = {"rewards": [HALF, rule], "max_completion_length": 3}
    job = stage_run("ppo", ROWS, ppo=section, reward_function=told, **SETTINGS)
    file = job.parent / "reward.py"
    file.write_text(
        "def reward(prompt, answer, expected):\n"
        "    assert 'Say number' in prompt and expected.startswith('it is')\n"
        "    return 1 / (len(answer) - 3)\n"
    )
    stage = loaded(job)
    ids = [stage.data.vocabulary.tokenizer.encode(text).ids for text in ("hello", "two")]
    answers = [Answer(one, [-1.0] * len(one), False) for one in ids]
    rows = stage.as_rows(stage.data.rows, [0, 1], answers)
    assert torch.equal(stage.rewards(rows, answers), torch.tensor([1.0, 0.0]).double())
    assert stage.failed == 0.5
    file.write_text("def reward(prompt, answer, expected): raise ValueError('not today')\n")
    assert stage.function is not None
    stage.function.close()
    with pytest.raises(Stopped, match="fails for all 2 answers: ValueError: not today"):
        stage.rewards(rows, answers)


PHASES: dict[str, tuple[Any, str]] = {
    "while answers are drawn": (decode._Loop, "_step"),
    "while answers are judged": (ppo.Stage, "rewards"),
    "while log-probabilities are asked": (ppo.Stage, "log_probs"),
    "while values are asked": (ppo.Stage, "values"),
    "before advantages": (ppo, "gae"),
    "before a loss": (ppo.Stage, "loss"),
    "before an update": (Loop, "_update"),
    "while a checkpoint is written": (checkpoint, "seal"),
    "before the result is written": (adapter, "write_result"),
}


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_ends_in_the_same_bytes(
    phase: str,
    epochs: int,
    stage_run: Make,
    every_step_told: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kill comes as soon as a checkpoint is there to go on from."""
    section = SECTION | {"num_ppo_epochs": epochs, "target_kl": 0.01}
    settings = {"training": SETTINGS["training"] | {"save_every_s": 0.01, "num_train_epochs": 4}}
    whole, killed = (stage_run("ppo", ROWS, ppo=section, **settings) for _ in range(2))
    assert finish(start(whole)) == [0]
    owner, name = PHASES[phase]
    real, saved = getattr(owner, name), killed.parent / "checkpoints"

    def dying(*args: Any, **more: Any) -> Any:
        if any(saved.glob("[0-9]*/manifest.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        assert finish(start(killed)) == [-signal.SIGKILL]
    assert not (killed.parent / "result").exists()
    assert finish(start(killed)) == [0]
    begun = [e["step"] for e in events_of(killed) if e["event"] == "started"]
    assert begun[-1] > 0, "it went on from a checkpoint"
    assert adapter_sha256(killed) == adapter_sha256(whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(stage_run: Make, every_step_told: None) -> None:
    one, two = (stage_run("ppo", ROWS, ppo=SECTION, **SETTINGS) for _ in range(2))
    assert finish(start(one)) == [0] and finish(start(two, 2)) == [0, 0]
    for name in ("reward", "loss", "kl", "explained_variance"):
        expected = [e[name] for e in steps(one)][:4]
        assert [e[name] for e in steps(two)][:4] == pytest.approx(expected, abs=1e-3), name
