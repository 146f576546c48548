"""What the stages share that learn from the model's own answers: prompts, answers drawn from the
model as it is, their rewards, and what decoding said of them.

A batch is `training.batch_size` prompts with `num_generations` answers each. They are drawn by a
counter (trainer/model/decode.py), so that a resumed run draws the same, and several optimizer steps
(`updates`) may learn from them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch, stage_rows
from trainer.data.errors import InvalidJob
from trainer.data.tokenised import Rows
from trainer.loop.guards import ExpectedMetrics, Stopped
from trainer.loop.ranks import Ranks
from trainer.model.decode import Answer, generate
from trainer.model.forward import hidden_states, model_inputs
from trainer.model.parts import decoder_layers
from trainer.model.roles import MAIN, Roles
from trainer.model.sampling import Sampling
from trainer.stages import compared, measured
from trainer.stages.reward_process import RewardFault, RewardProcess
from trainer.stages.rewards import reward
from trainer.wire.chain import chain_of, reward_defect, weights_sha256
from trainer.wire.job import DataFile, Job
from trainer.wire.stages import Rollouts

# Nats a token, a mean, by which decoding and training may differ: twice what random weights of 32
# and 36 layers give, which are more sensitive than trained ones (docs/speed-log.md). In FP8 a
# rounding moves a value by a sixteenth.
DRIFT, DRIFT_FP8 = 0.1, 1.0
KEYS_A_TOKEN = 4  # tokens whose keys take no more memory than one of a micro-batch in training
HELD_OUT = 64  # prompts that are answered before and after
KEPT = "rollout/"  # of what is kept in a checkpoint
JUDGE = "judge"  # the reward model's role
FOREIGN = "train it by stage rm from what the policy starts from, or set foreign_reward = true"


@dataclass
class Rollout:
    """The answers of one batch of prompts, of all processes: rows of prompt and answer, in which
    the answer is trained. `made` is what else is known of them, in host memory: "said", the
    log-probabilities of the answers' tokens by decoding (rows, longest), 0 behind an answer;
    "ended" (rows,), whether by the stop token; "reward" (rows,), fp64; and what a stage adds."""

    number: int
    rows: Rows
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.rows.trained.sum())

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer (rows,)."""
        return torch.from_numpy(
            np.add.reduceat(self.rows.trained, self.rows.starts[:-1], dtype=int)
        )

    @property
    def mask(self) -> Tensor:
        """1.0 where an answer has a token (rows, longest), fp64."""
        places = torch.arange(self.made["said"].shape[1])
        return (places < self.lengths[:, None]).double()


@dataclass(frozen=True)
class Judge:
    """How a reward model's scores count: `mean` and `deviation` of its scores of held-out rows,
    `most` deviations at most, times `weight`."""

    mean: float
    deviation: float
    most: float
    weight: float

    def counted(self, scores: Tensor) -> Tensor:
        reach = self.most * self.deviation
        return self.weight * scores.clamp(self.mean - reach, self.mean + reach)


class Stage(compared.Stage):
    """`settings` is the stage's section, `updates` the optimizer steps on one batch of answers."""

    settings: Rollouts
    updates: int

    def __init__(self, job: Job, run: Path, settings: Rollouts, updates: int) -> None:
        if job.lora.lora_dropout:
            raise InvalidJob(
                f"stage {job.stage} learns from what the model says, which dropout blurs",
                hint="set lora.lora_dropout = 0",
            )
        super().__init__(job, run)
        self.settings, self.updates = settings, updates
        self.total_steps = self.order.total_steps * updates
        self.expected = ExpectedMetrics(still_steps=True)
        self.wanted = self._wanted(job.data.files)
        if job.data.held_out is not None:
            self.wanted |= self._wanted([job.data.held_out])
        self.judge = self._judge()
        self.failed = 0.0  # the share of answers that the function could not judge, the last time
        self.function: RewardProcess | None = None
        if settings.function is not None and job.reward_function is not None:
            path = run / job.reward_function.path
            self.function = RewardProcess(path, settings.function.seconds)
        self.rollout: Rollout | None = None
        self.told: dict[int, dict[str, float]] = {}  # of steps that are not reported yet

    def _wanted(self, files: list[DataFile]) -> dict[str, str]:
        """file:line -> the answer that a reward may look for."""
        found, _ = stage_rows.read(self.job, [(self.run / f.path, f.name) for f in files])
        return {row.where: row.turns[-1].text for row in found}

    def _judge(self) -> Judge | None:
        """The judge that the job's reward model is. Raises InvalidJob for one that must not judge
        this policy.
        """
        rule, told = self.settings.judge, self.job.judge
        if rule is None or told is None:
            return None
        folder, start = self.run / told.path, self.job.start
        chain = chain_of(folder)
        merges = start is None and bool(self.job.merged)
        taken = self.job.merged[-1] if merges else start
        before = chain_of(self.run / taken.path) if taken else None
        foreign, base = self.settings.foreign_reward, self.job.model.base
        why = reward_defect(chain, weights_sha256(folder), before, base, foreign, merges)
        if chain is None or why:
            raise InvalidJob(
                f"the reward model {told.name} must not judge here: {why}", hint=FOREIGN
            )
        numbers = chain.links[-1].numbers
        mean, deviation = numbers.get("reward mean", 0.0), numbers.get("reward deviation", 1.0)
        most: float = getattr(self.settings, "score_clip", float("inf"))
        return Judge(mean, deviation, most, rule.weight)

    def validate(self, rows: Rows) -> None:
        """Prompts have no labels."""

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.roles = Roles(self.model)
        if self.job.judge is not None:
            self.roles.add(JUDGE, self.run / self.job.judge.path, trained=False)

    @property
    def longest(self) -> int:
        return max(self.lengths) + self.settings.max_completion_length

    @property
    def kept_tokens(self) -> int | None:
        """Tokens whose keys fit on a GPU where a micro-batch of training fits: while answers are
        drawn its room is free. Of a layer that is recomputed little is kept."""
        if self.ranks.device.type != "cuda":
            return None
        remade = min(1.0, self.recomputed / len(decoder_layers(self.model)))
        return int(self.budget * (KEYS_A_TOKEN * (1 - remade) + remade / 2))

    # -- answers ---------------------------------------------------------------------------------

    def batches(self, step: int) -> batch.Work:
        """The prompts' places alone: their answers are not there yet."""
        prompts = self.order.step(step // self.updates)
        where = [self.data.rows.where[p] for p in prompts]
        return batch.Work([], {}, 1, sum(self.lengths[p] for p in prompts), where)

    def answers_of(self, step: int) -> Rollout:
        """The answers that optimizer step `step` learns from: those at hand, or new ones, of which
        the stage has made what it needs (`complete`). Collective."""
        number = step // self.updates
        if self.rollout is None or self.rollout.number != number:
            made = self._drawn(number)
            self.complete(made)
            self.rollout = made
        return self.rollout

    @abstractmethod
    def complete(self, made: Rollout) -> None:
        """Adds to the answers what the stage learns by, with the model as it is. Collective."""

    def _drawn(self, number: int) -> Rollout:
        """Answers to the prompts of batch `number`, of all processes, with their rewards."""
        settings, prompts = self.settings, self.order.step(number)
        size = settings.num_generations
        asked = [p for p in prompts for _ in range(size)]
        keys = [p * size + k for p in prompts for k in range(size)]
        mine = range(self.ranks.rank, len(asked), self.ranks.world)
        sampling = Sampling(settings.temperature, self.job.training.seed, number)
        self.roles.take(MAIN)
        found = generate(
            self.model,
            [self.prompt(self.data.rows, asked[k]) for k in mine],
            {self.data.stop_id},
            self.ranks.device,
            settings.max_completion_length,
            sampling,
            [keys[k] for k in mine],
            kept_tokens=self.kept_tokens,
        )
        parts = self.ranks.gather(found)
        answers = [parts[k % self.ranks.world][k // self.ranks.world] for k in range(len(asked))]
        made = Rollout(number, self.as_rows(self.data.rows, asked, answers))
        said = torch.zeros(len(answers), max(len(a.ids) for a in answers))
        for k, one in enumerate(answers):
            said[k, : len(one.ids)] = torch.tensor(one.log_probs)
        made.made["said"] = said
        made.made["ended"] = torch.tensor([a.ended for a in answers])
        # a function, or a sum on a GPU, may differ from process to process
        made.made["reward"] = self.ranks.gather(self.rewards(made.rows, answers))[0]
        if self.function is not None:
            made.made["failed"] = torch.tensor(self.failed, dtype=torch.float64)
        return made

    def as_rows(self, prompts: Rows, asked: list[int], answers: list[Answer]) -> Rows:
        """Rows of the prompts `asked`, each with its answer, which is trained."""
        ids, marks = [], []
        for p, one in zip(asked, answers, strict=True):
            prompt = self.prompt(prompts, p)
            ids.append(np.asarray([*prompt, *one.ids], np.int32))
            marks.append(np.arange(len(ids[-1])) >= len(prompt))
        starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
        where = [prompts.where[p] for p in asked]
        prompted = np.ones(len(ids), np.bool_)
        return Rows(np.concatenate(ids), np.concatenate(marks), starts, prompted, where)

    def prompt(self, rows: Rows, number: int) -> list[int]:
        ids: list[int] = rows.ids[rows.starts[number] : rows.starts[number + 1]].tolist()
        return ids

    def rewards(self, rows: Rows, answers: list[Answer]) -> Tensor:
        """The reward of each answer, fp64 (rows,), the same on all processes."""
        texts = [self._text(a.ids[:-1] if a.ended else a.ids) for a in answers]
        rules = [r for r in self.settings.rewards if not r.is_asked]
        told = zip(texts, answers, rows.where, strict=True)
        by_rules = [reward(rules, text, len(a.ids), self.wanted[w]) for text, a, w in told]
        found = torch.tensor(by_rules, dtype=torch.float64)
        if (rule := self.settings.function) is not None:
            found += rule.weight * self._by_function(rows, texts)
        if self.judge is not None:
            found += self.judge.counted(self._scored(rows))
        return found

    def _scored(self, rows: Rows) -> Tensor:
        """What the reward model says of each row at its answer's last token, fp64 (rows,)."""
        found = torch.zeros(len(rows), dtype=torch.float64)
        self.roles.take(JUDGE)
        for micro in self.micro(rows, range(len(rows))):
            there = batch.on(self.ranks.device, micro)
            states = hidden_states(self.model, **model_inputs(there)).flatten(0, 1)
            ends = states.index_select(0, there["stage/ends"]).float()
            said: Tensor = self.roles.head(JUDGE)(ends)[:, 0]
            found[list(micro["stage/numbers"])] = said.double().cpu()
        self.roles.take(MAIN)
        return found

    def _text(self, ids: list[int]) -> str:
        text: str = self.data.vocabulary.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _by_function(self, rows: Rows, texts: list[str]) -> Tensor:
        """What the user's function gives, fp64 (rows,), 0 where it fails. Raises Stopped where it
        gives nothing to any answer."""
        assert self.function is not None
        ends = np.asarray(rows.starts[1:]) - np.add.reduceat(
            rows.trained, rows.starts[:-1], dtype=int
        )
        prompts = [
            self._text(rows.ids[a:b].tolist()) for a, b in zip(rows.starts, ends, strict=False)
        ]
        wanted = [self.wanted[w] for w in rows.where]
        try:
            given = self.function.ask(list(zip(prompts, texts, wanted, strict=True)))
        except RewardFault as why:
            raise Stopped(str(why), [], "mend the file of the reward") from why
        faults = [one for one in given if isinstance(one, str)]
        self.failed = len(faults) / len(given)
        if len(faults) == len(given):
            raise Stopped(
                f"the reward function fails for all {len(given)} answers: {faults[0]}",
                list(rows.where[:8]),
                "mend the file of the reward; `reward(prompt, answer, expected)` returns a number",
            )
        return torch.tensor([0.0 if isinstance(x, str) else x for x in given], dtype=torch.float64)

    def facts_of(self, made: Rollout) -> dict[str, float]:
        """The metrics of a batch of answers."""
        rewards, ended = made.made["reward"], made.made["ended"]
        failed = {k: float(made.made[k]) for k in ("failed",) if k in made.made}
        return failed | {
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std()) if len(rewards) > 1 else 0.0,
            "truncated": float((~ended).double().mean()),
            "answer_tokens": made.tokens / len(made.rows),
        }

    # -- what the model says of them -------------------------------------------------------------

    def log_probs(self, micro: dict[str, Any]) -> Tensor:
        """Log-probabilities of the answers' tokens in the distribution that they were drawn from
        (rows, longest).
        """
        self.roles.take(MAIN)
        return compared.answer_log_probs(self.model, micro, self.settings.temperature)[0]

    def asked_of(self, made: Rollout, numbers: list[int], ask: Any) -> Tensor:
        """What `ask(micro)` (rows,) or (rows, longest) says of the answers `numbers` of this
        process, put together for all answers of all processes, in host memory. Collective."""
        found: Tensor | None = None
        for micro in self.micro(made.rows, numbers):
            said = self.ranks.enter(ask, batch.on(self.ranks.device, micro)).float()
            if found is None:
                found = self._empty(made, said.ndim)
            places = list(micro["stage/numbers"])
            if said.ndim > 1:
                found[places, : said.shape[1]] = said
            else:
                found[places] = said
        wide = self.ranks.gather(0 if found is None else found.ndim)
        if found is None:
            found = self._empty(made, max(wide))
        return self.ranks.sum(found).cpu()

    def _empty(self, made: Rollout, dimensions: int) -> Tensor:
        shape = made.made["said"].shape[:dimensions]
        return torch.zeros(shape, device=self.ranks.device)

    def with_made(self, made: Rollout, micro: dict[str, Any], *names: str) -> dict[str, Any]:
        """The micro-batch with "stage/NAME" of its rows, for what is in made.made."""
        at, longest = list(micro["stage/numbers"]), micro["stage/longest"]
        told = {f"stage/{name}": made.made[name][at].float() for name in names}
        return micro | {k: v[:, :longest] if v.ndim > 1 else v for k, v in told.items()}

    def validate_drift(self, step: int, drift: float) -> None:
        """Raises Stopped when decoding and training differ by `drift` nats a token."""
        if drift > (DRIFT_FP8 if self.job.model.precision == "fp8" else DRIFT):
            raise Stopped(
                f"step {step}: decoding and training differ by {drift:.3f} nats a "
                "token: the answers were drawn from another model than the one that learns",
                [],
                "report this, with the model's name and model.precision",
            )

    # -- between runs, and held out --------------------------------------------------------------

    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """The mean reward of greedy answers to the first prompts, and their tokens."""
        chosen = list(range(min(HELD_OUT, len(held))))
        asked = [self.prompt(held, k) for k in chosen]
        stops, most = {self.data.stop_id}, self.settings.max_completion_length
        self.roles.take(MAIN)
        found = generate(model, asked, stops, self.ranks.device, most)
        rewards = self.rewards(self.as_rows(held, chosen, found), found)
        return {
            "reward": float(rewards.mean()),
            "answer tokens": sum(len(a.ids) for a in found) / len(found),
        }

    def state(self) -> dict[str, Tensor]:
        """The answers too, where several steps learn from them."""
        made, kept = self.rollout, super().state()
        if made is None or self.updates == 1:
            return kept
        rows = {"ids": made.rows.ids, "trained": made.rows.trained, "starts": made.rows.starts}
        kept |= {f"{KEPT}rows/{k}": torch.from_numpy(v) for k, v in rows.items()}
        kept[f"{KEPT}number"] = torch.tensor(made.number)
        return kept | {f"{KEPT}made/{k}": v for k, v in made.made.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        kept = {k.removeprefix(KEPT): v for k, v in state.items() if k.startswith(KEPT)}
        if not kept:
            return
        number, size = int(kept["number"]), self.settings.num_generations
        asked = [p for p in self.order.step(number) for _ in range(size)]
        rows = Rows(
            kept["rows/ids"].numpy(),
            kept["rows/trained"].numpy(),
            kept["rows/starts"].numpy(),
            np.ones(len(asked), np.bool_),
            [self.data.rows.where[p] for p in asked],
        )
        made = {k.removeprefix("made/"): v for k, v in kept.items() if k.startswith("made/")}
        self.rollout = Rollout(number, rows, made)
