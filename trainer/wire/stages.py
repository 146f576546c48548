"""What the job file, the plan and the trainer must know of a training stage before it runs.

Data only. What a stage does is in trainer/stages/NAME.py, and told in docs/stages.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.wire.prompts import PROMPT_METHODS

StageName = Literal["pt", "sft", "rm", "dpo", "kto", "ppo", "grpo"]
RowKind = Literal["rows", "documents", "pairs", "tagged", "prompts"]

Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class StageFacts:
    """`formats` are the data.format values whose rows it trains on, `rows` what they become
    (trainer/data/stage_rows.py), `methods` the training.method values that it takes. On one base,
    `adapters` are trained, with their gradients and moments, and `frozen_adapters` only held (a
    reference, a reward model). `work` is its time for a token of its rows, sft's being 1: every
    pass counts. `looks`: whether held-out loss and accuracy are measured while it trains;
    `splits`: whether it may hold out rows by itself."""

    formats: tuple[str, ...]
    rows: RowKind = "rows"
    methods: tuple[str, ...] = ("lora", "full", "freeze", *PROMPT_METHODS)
    adapters: int = 1
    frozen_adapters: int = 0
    work: float = 1.0
    looks: bool = False
    splits: bool = True

    @property
    def rows_per_item(self) -> int:
        """Rows of what training.batch_size counts: both sides of a pair."""
        return 2 if self.rows == "pairs" else 1

    @property
    def learns_preferences(self) -> bool:
        return self.rows in ("pairs", "tagged")

    @property
    def memory(self) -> dict[str, int]:
        """Keyword arguments of trainer.memory's functions."""
        return {"adapters": self.adapters, "frozen_adapters": self.frozen_adapters}


ANSWERS = ("alpaca", "sharegpt", "messages", "prompt", "text")

STAGES: Mapping[StageName, StageFacts] = {
    "pt": StageFacts(formats=ANSWERS, rows="documents", looks=True),
    "sft": StageFacts(formats=ANSWERS, looks=True),
    # no logits are computed; otherwise the work of a token is sft's
    "rm": StageFacts(formats=(), rows="pairs", methods=("lora",), looks=True),
    # a forward pass of the adapter that it starts from, beside forward and backward
    "dpo": StageFacts(
        formats=(), rows="pairs", methods=("lora",), frozen_adapters=1, work=1.5, looks=True
    ),
    # the same, and both on prompts with another row's answer
    "kto": StageFacts(
        formats=(), rows="tagged", methods=("lora",), frozen_adapters=1, work=2.5, looks=True
    ),
    "ppo": StageFacts(
        formats=("alpaca", "sharegpt", "messages", "prompt"),
        rows="prompts",
        methods=("lora",),
        adapters=2,
        frozen_adapters=2,
        splits=False,
    ),
    "grpo": StageFacts(
        formats=("alpaca", "sharegpt", "messages", "prompt"),
        rows="prompts",
        methods=("lora",),
        frozen_adapters=1,
        splits=False,
    ),
}


class Section(BaseModel):
    """The settings of one stage. Frozen; an unknown key is an error with its path, and so is a
    number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Pt(Section):
    overlap: Annotated[
        Count,
        Field(
            description="Tokens that a window of a document repeats of the one before, untrained"
        ),
    ] = 0


class Shares(Section):
    """The settings of a stage whose items are several answers to one prompt."""

    share_prompts: Annotated[
        bool | None,
        Field(description="Whether a prompt of 16 tokens or more is computed once for its answers"),
    ] = None


class Rm(Shares):
    center_rewards_coefficient: Annotated[
        NotNegative,
        Field(description="Of (chosen + rejected)^2 in the loss: keeps the mean reward at 0"),
    ] = 0.0


PairLoss = Literal["sigmoid", "robust", "ipo", "hinge", "apo_zero", "apo_down", "orpo", "simpo"]
WITHOUT_REFERENCE = ("orpo", "simpo")


class Dpo(Shares):
    loss_type: Annotated[PairLoss, Field(description="docs/stages.md says each")] = "sigmoid"
    beta: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Left out: 0.1, for simpo 2.0"),
    ] = None
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=0.5, description="Share of pairs that may be swapped: sigmoid, robust"),
    ] = 0.0
    simpo_gamma: Annotated[NotNegative, Field(description="simpo's margin")] = 1.0
    sft_weight: Annotated[
        NotNegative, Field(description="Of the chosen answers' cross-entropy, beside the loss")
    ] = 0.0
    ld_alpha: Annotated[
        float,
        Field(ge=0, le=1, description="Weight of tokens beyond the shorter side's length"),
    ] = 1.0

    @model_validator(mode="after")
    def _has_what_its_loss_reads(self) -> Dpo:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing says nothing to loss_type {self.loss_type!r}")
        if self.loss_type != "simpo" and self.simpo_gamma != 1.0:
            raise ValueError(f"simpo_gamma says nothing to loss_type {self.loss_type!r}")
        return self


class Kto(Section):
    beta: Annotated[float, Field(gt=0)] = 0.1
    desirable_weight: Annotated[NotNegative, Field(description="Of wanted answers")] = 1.0
    undesirable_weight: Annotated[NotNegative, Field(description="Of unwanted answers")] = 1.0


class Reward(Section):
    """One rule of a reward, from 0 to 1 times `weight`. match: the answer is the row's. contains:
    the row's answer stands in it. format: `regex` is found in it. length: 1 at `tokens` tokens,
    falling to 0 at none and at twice as many. Without bounds: model, the score that the reward
    model in `path`, the adapter of a run of stage rm, gives; python, what `reward(prompt, answer,
    expected)` in the file `path` returns within `seconds`, 0 where it fails."""

    kind: Literal["match", "contains", "format", "length", "model", "python"]
    weight: float = 1.0
    regex: str = ""
    path: str = ""
    tokens: Annotated[int, Field(gt=0)] = 64
    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0

    @property
    def is_asked(self) -> bool:
        """Whether it is no rule of ours, but asks a model or a function."""
        return self.kind in ("model", "python")

    @model_validator(mode="after")
    def _has_its_regex(self) -> Reward:
        if self.kind == "format":
            try:
                re.compile(self.regex)
            except re.error as why:
                raise ValueError(f"regex {self.regex!r}: {why}") from why
        if (self.kind == "format") != bool(self.regex):
            raise ValueError('regex belongs to kind = "format", which needs one')
        if self.is_asked != bool(self.path):
            raise ValueError('path belongs to kind = "model" and "python", which need one')
        return self


# Work of a token, sft's being 1: decoded with 64 rows at a time (6,844 tokens a second of 32 rows
# on an H200 beside 20,000 that train: docs/speed-log.md), and read without gradients.
DECODED, READ = 3.0, 0.4


class Rollouts(Section):
    """The settings of a stage that learns from the model's own answers."""

    rewards: Annotated[list[Reward], Field(min_length=1)] = [Reward(kind="match")]
    num_generations: Annotated[int, Field(ge=1, description="Answers to each prompt")] = 1
    max_completion_length: Annotated[int, Field(gt=0, description="Tokens of an answer")] = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    foreign_reward: Annotated[
        bool, Field(description="Whether a reward model may come from another chain, or guess")
    ] = False

    @model_validator(mode="after")
    def _one_of_each(self) -> Rollouts:
        for kind in ("model", "python"):
            if sum(r.kind == kind for r in self.rewards) > 1:
                raise ValueError(f"rewards: one of kind {kind}, not several")
        return self

    @property
    def work(self) -> float:
        """What a token of a prompt with an answer costs, sft's being 1."""
        raise NotImplementedError

    @property
    def judge(self) -> Reward | None:
        """The rule that asks a reward model."""
        return next((r for r in self.rewards if r.kind == "model"), None)

    @property
    def function(self) -> Reward | None:
        """The rule that asks a user's function."""
        return next((r for r in self.rewards if r.kind == "python"), None)


class Ppo(Rollouts):
    num_ppo_epochs: Annotated[int, Field(ge=1, description="Passes over the same answers")] = 2
    num_mini_batches: Annotated[int, Field(ge=1, description="Optimizer steps of a pass")] = 1
    kl_coef: Annotated[
        NotNegative, Field(description="Of the KL to the start in each token's reward")
    ] = 0.05
    target_kl: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="KL of an answer, in nats, that kl_coef is led to; left out, it stays"),
    ] = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    cliprange: Annotated[float, Field(gt=0, lt=1)] = 0.2
    cliprange_value: Annotated[float, Field(gt=0)] = 0.5
    vf_coef: Annotated[float, Field(gt=0, description="Of the value's loss")] = 0.1
    value_learning_rate: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Left out: three times training.learning_rate"),
    ] = None
    value_warmup: Annotated[
        Count, Field(description="Batches of answers from which the value alone learns")
    ] = 0
    missing_eos_penalty: Annotated[
        NotNegative | None,
        Field(
            description="Taken from the score of an answer without its stop token; left out: two "
            "deviations of the reward model's scores, without one 1"
        ),
    ] = None
    score_clip: Annotated[
        float, Field(gt=0, description="Deviations that a reward model's score counts at most")
    ] = 10.0

    @property
    def work(self) -> float:
        """Decoded, read by policy, start, reward and value, and learned by policy and value."""
        return DECODED + 4 * READ + 2 * self.num_ppo_epochs


class Grpo(Shares, Rollouts):
    loss_type: Annotated[
        Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"],
        Field(description="docs/stages.md says each"),
    ] = "dapo"
    num_generations: Annotated[int, Field(ge=2, description="Answers to each prompt")] = 8
    num_iterations: Annotated[
        int, Field(ge=1, description="Optimizer steps on the same answers")
    ] = 1
    beta: Annotated[
        NotNegative, Field(description="Of the KL to the start; 0 asks no reference")
    ] = 0.0
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Left out: epsilon, for cispo 5.0 (the largest weight)"),
    ] = None
    scale_rewards: Annotated[
        Literal["group", "batch", "none", "rloo"],
        Field(description="What an advantage is divided by; rloo: less the others' mean"),
    ] = "group"
    mask_truncated: Annotated[
        bool, Field(description="Answers that reach the limit teach nothing")
    ] = False

    @property
    def work(self) -> float:
        """Decoded, read by the start, the policy before its steps and the reward model where they
        are asked, and learned."""
        reads = (self.beta > 0) + (self.num_iterations > 1) + (self.judge is not None)
        return DECODED + READ * reads + self.num_iterations


class Sections(BaseModel):
    """A section for each stage that has settings, as the job file and job.json have them."""

    pt: Pt = Pt()
    rm: Rm = Rm()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    ppo: Ppo = Ppo()
    grpo: Grpo = Grpo()


def section_defect(stage: StageName, job: Sections) -> str:
    """Why a job of `stage` must not have the sections that it has; empty where it may. A section as
    it is by default says nothing."""
    plain = Sections()
    told = [n for n in Sections.model_fields if getattr(job, n) != getattr(plain, n)]
    others = [name for name in told if name != stage]
    return f"[{others[0]}] says nothing to stage {stage}: remove it" if others else ""


def format_defect(stage: StageName, data_format: str) -> str:
    """Why `stage` does not train on rows of data.format `data_format`; empty where it does."""
    formats = STAGES[stage].formats
    if data_format in ("auto", *formats):
        return ""
    return (
        f"stage {stage} does not train on rows of format {data_format}: it takes "
        f"{', '.join(formats or ('auto',))}"
    )


def method_defect(stage: StageName, method: str) -> str:
    """Why `stage` does not train by training.method `method`; empty where it does."""
    methods = STAGES[stage].methods
    if method in methods:
        return ""
    return f'stage {stage} is trained by training.method = "{methods[0]}", not by "{method}"'


def work_of(job: Any) -> float:
    """What a token costs in the job's stage, sft's being 1."""
    section = getattr(job, job.stage, None)
    return section.work if isinstance(section, Rollouts) else STAGES[job.stage].work


def section_of(job: Any) -> dict[str, dict[str, Any]]:
    """The section of the job's own stage, by its name, as plain data; empty where it has none."""
    name: str = job.stage
    return {name: getattr(job, name).model_dump()} if name in Sections.model_fields else {}
