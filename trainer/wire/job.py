"""The wire's schema: job.json, written by ops and read by the trainer. pydantic only, never torch.

Everything is relative to the run folder (``milktea/RUN/`` under the login's home). ``WIRE`` changes
when a reader of the old number could misread a file of the new one; the image carries the number,
and ops compares before renting. Within one number keys are only added, with a default that means
what leaving them out meant, and no default changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.wire.prompts import (
    PROMPT_METHODS,
    PromptLearning,
    prompt_defect,
    prompt_start_defect,
    settings_defect,
)
from trainer.wire.stages import (
    STAGES,
    Sections,
    StageName,
    format_defect,
    method_defect,
    section_defect,
)

WIRE = 2
MOST_STAGES = 12
UP = "../../"  # from a stage's folder to that of its run
UNKNOWN = "0" * 64  # the sha256 of an adapter that is not trained yet

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "nf4", "int8"]
Method = Literal[
    "lora", "full", "freeze", "prefix_tuning", "p_tuning_v2", "p_tuning", "prompt_tuning"
]
Schedule = Literal["linear", "cosine", "constant", "warmup_stable_decay"]
Optim = Literal["adamw", "adamw_8bit", "muon"]
DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt", "text"]
OverLength = Literal["refuse", "drop", "truncate", "split"]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
Column = Literal[
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "conversations",
    "messages",
    "prompt",
    "completion",
    "text",
    "tools",
    "role",
    "content",
]
BadRows = Literal["refuse", "drop"]
TrainOn = Literal["all", "last"]
How = Literal["continue", "stack"]
StageHow = Literal["continue", "stack", "merge"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error with its path, and so is a number that is not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Lora(Strict):
    """PEFT's own names and meanings (peft.LoraConfig). A string in ``target_modules`` and
    ``exclude_modules`` is a regular expression that a module's whole name must match, keys of the
    patterns one that its end must. ``loraplus_lr_ratio`` (LoRA+) multiplies the learning rate of
    every B."""

    r: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Fraction = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, Positive] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal["default", "pissa", "gaussian"] = "default"
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _expressions_are_regular(self) -> Lora:
        told = [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)]
        told += [("rank_pattern", k) for k in self.rank_pattern]
        told += [("alpha_pattern", k) for k in self.alpha_pattern]
        for name, value in told:
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as why:
                raise ValueError(f"{name}: {value!r} is no regular expression: {why}") from why
        return self

    @model_validator(mode="after")
    def _something_is_adapted(self) -> Lora:
        if not self.target_modules:
            raise ValueError('target_modules: names no module: "all-linear" is all')
        return self

    @model_validator(mode="after")
    def _layers_are_chosen_once(self) -> Lora:
        chosen, wanted = self.layers_to_transform, self.target_modules
        if chosen is None:
            return self
        listed = chosen if isinstance(chosen, list) else [chosen]
        if not listed or min(listed) < 0:
            raise ValueError(f"layers_to_transform: {chosen} names no layer: they count from 0")
        if isinstance(wanted, str) and wanted != "all-linear":
            raise ValueError(
                "layers_to_transform: the expression in target_modules says which layers: "
                r"write them there, as layers\.(0|1)\."
            )
        return self

    @property
    def largest_rank(self) -> int:
        """The largest rank of any module, which the memory prediction uses."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r

    @property
    def counted_modules(self) -> list[str] | Literal["all-linear"]:
        """The target modules as the memory prediction counts them: an expression counts as every
        linear layer.
        """
        named = self.target_modules
        return "all-linear" if isinstance(named, str) else named


class Training(Strict):
    """transformers' names where they exist. ``batch_size`` counts rows of one optimizer step over
    all GPUs together; how many tokens one GPU takes at a time, and how many layers are
    checkpointed, is solved from its memory."""

    method: Method = "lora"
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: Schedule = "cosine"
    warmup_ratio: Fraction = 0.03
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # instead of the ratio
    min_lr_rate: Fraction = 0.0  # of the peak, at the end
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2  # of the steps, warmup_stable_decay
    optim: Optim = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    # of a mixture's experts; "default": the family's own
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | Literal["default"] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # steps between two looks at the held-out rows; None: as often as is cheap, 0: never
    eval_steps: Annotated[int, Field(ge=0)] | None = None
    early_stopping_patience: Positive | None = None  # looks in a row without a smaller loss
    load_best_model_at_end: bool = False
    packing: bool = True
    freeze_trainable_layers: Positive = 2
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    save_every_s: Annotated[float, Field(gt=0)] = 300.0
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]

    @model_validator(mode="after")
    def _a_floor_needs_a_decay(self) -> Training:
        if self.min_lr_rate and self.lr_scheduler_type == "constant":
            raise ValueError('min_lr_rate: lr_scheduler_type = "constant" never falls')
        return self

    @model_validator(mode="after")
    def _the_best_needs_looks(self) -> Training:
        if self.eval_steps == 0 and (asked := self.asks_for_the_best):
            raise ValueError(f"{asked}: eval_steps = 0 never looks while it trains")
        return self

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base itself are trained."""
        return self.method in ("full", "freeze")

    @property
    def asks_for_the_best(self) -> str:
        """The first setting that needs looks at held-out rows; empty without one."""
        if self.early_stopping_patience:
            return "early_stopping_patience"
        return "load_best_model_at_end" if self.load_best_model_at_end else ""


class ModelSpec(Strict):
    """``base`` is a hub id, or the name that the folder ``path`` (relative to the run folder,
    pushed with the data) goes by."""

    base: str
    revision: str | None = None
    path: str | None = None
    precision: Precision = "bf16"


class DataFile(Strict):
    """``path`` is relative to the run folder; ``name`` is what the user called it, and what errors
    name."""

    path: str
    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size_bytes: int


class Data(Strict):
    """``template`` is ``chat`` (the tokenizer's own) or a name in trainer/data/templates;
    ``template_text`` carries a user's own template file whole, so that training and use later agree
    to the byte. ``train_on`` is which answers of a conversation are learned. ``enable_thinking`` is
    the flag of inference; left out, each answer is trained as it is, with reasoning or without.
    ``columns`` says what the files call a column, ``fill`` what stands for {{name}} in a text.
    ``held_out`` are rows of their own, ``held_out_share`` what share of ``files`` is held out (of
    few rows nothing is; trainer/data/held_out.py)."""

    files: list[DataFile]
    held_out: DataFile | None = None
    held_out_share: Fraction = 0.0
    format: DataFormat = "auto"
    template: str = "alpaca"
    template_text: str | None = None
    max_length: Positive = 2048
    over_length: OverLength = "refuse"
    train_on: TrainOn = "all"
    enable_thinking: bool | None = None
    columns: dict[Column, str] = {}
    fill: dict[str, str] = {}
    bad_rows: BadRows = "refuse"

    @model_validator(mode="after")
    def _pieces_are_learned(self) -> Data:
        if self.over_length == "split" and self.train_on == "last":
            raise ValueError('over_length = "split" has no place for train_on = "last": drop')
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> Data:
        if self.held_out is not None and self.held_out_share:
            raise ValueError("held_out and held_out_share: one of them says what is held out")
        return self


class Stage(Strict):
    """One training of a run. What it does not say, the job says for all of them; its section
    ([pt], [rm] and so on) is the job's. `how` it takes up the adapter of the stage before, or the
    job's start. With `min_accuracy` or `max_loss` the run ends after this stage where its held-out
    rows give less, or more."""

    name: StageName
    how: StageHow = "continue"
    data: Data | None = None
    lora: Lora | None = None
    training: Training | None = None
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    max_loss: Annotated[float, Field(gt=0)] | None = None


class Adapter(Strict):
    """A LoRA that the box gets with the job, in the folder `path` of the run folder. `name` is what
    the user called it, `sha256` that of its weights."""

    path: str
    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Start(Adapter):
    """What training starts from. continue: its A and B are trained on. stack: it stays, and a fresh
    adapter is trained beside it; `lora` then has the rank of both."""

    how: How = "continue"


class Limits(Strict):
    """What the box must keep to by itself. After ``deadline_unix_s``, by its own clock, the
    trainer saves a checkpoint and stops."""

    deadline_unix_s: float | None = None


class Job(Strict, Sections):
    """job.json. ``processes`` is the number of GPUs (or CPU processes) that accelerate starts.
    ``environment`` names the variables that came with the launch; their values are in no file."""

    wire: int = WIRE
    run_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{2,62}$")]
    stages: Annotated[list[Stage], Field(min_length=1, max_length=MOST_STAGES)] = [
        Stage(name="sft")
    ]
    model: ModelSpec
    data: Data
    merged: list[Adapter] = []  # into the base, in order, in fp32 and cast once
    merged_base: str = "merged"  # the folder that they make of it, made where it is not there
    start: Start | None = None
    judge: Adapter | None = None  # the reward model
    reward_function: DataFile | None = None
    lora: Lora = Lora()
    prompt_learning: PromptLearning = PromptLearning()
    training: Training = Training()
    processes: Positive = 1
    environment: list[EnvironmentName] = []
    limits: Limits = Limits()

    @property
    def stage(self) -> StageName:
        """The name of the stage whose result is the run's."""
        return self.stages[-1].name

    def folder(self, number: int) -> str:
        """Of stage `number` (from 0) of several, in the run folder."""
        return f"stages/{number + 1}-{self.stages[number].name}"

    def parts(self) -> list[tuple[Job, str]]:
        """Each stage as a job by itself, with the folder that is its run folder, relative to the
        run's. Of one stage it is the job as it is."""
        if len(self.stages) == 1:
            return [(self, ".")]
        return [(self.part(n), self.folder(n)) for n in range(len(self.stages))]

    def starts_from(self, number: int) -> int | None:
        """The stage whose adapter stage `number` takes up: the newest before it that is no reward
        model; None where it is the job's own start."""
        before = [n for n in range(number) if self.stages[n].name != "rm"]
        return before[-1] if before else None

    def judged_by(self, number: int) -> int | None:
        """The stage whose reward model judges stage `number`; None where none does."""
        if self.judge is not None or not _asks_a_model(self, self.stages[number].name):
            return None
        before = [n for n in range(number) if self.stages[n].name == "rm"]
        return before[-1] if before else None

    def part(self, number: int, sha256s: Mapping[int, str] | None = None) -> Job:
        """Stage `number` of several as a job by itself, in a run folder of its own (`folder`).
        `sha256s` are those of the adapters that earlier stages left. Raises ValueError for a stage
        that cannot be trained so."""
        stage, own = self.stages[number], {n: getattr(self, n) for n in Job.model_fields}
        plain, section = Sections(), getattr(self, stage.name, None)
        own |= {n: getattr(plain, n) for n in Sections.model_fields if n != stage.name}
        function = getattr(section, "function", None) and self.reward_function
        own |= {
            "stages": [Stage(name=stage.name)],
            "model": _above(self.model),
            "data": _data_above(stage.data or self.data),
            "lora": stage.lora or self.lora,
            "training": stage.training or self.training,
            "start": _above(self.start),
            "merged": [_above(adapter) for adapter in self.merged],
            "merged_base": UP + self.merged_base,
            "judge": _above(self.judge) if _asks_a_model(self, stage.name) else None,
            "reward_function": _above(function or None),
        }

        def left(source: int) -> dict[str, Any]:
            told = {"path": f"{UP}{self.folder(source)}/adapter", "name": self.folder(source)}
            return told | {"sha256": (sha256s or {}).get(source, UNKNOWN)}

        if (source := self.starts_from(number)) is not None:
            merging = [n for n in self._line_of(number) if self.stages[n].how == "merge"]
            own["merged"] += [left(at) for n in merging if (at := self.starts_from(n)) is not None]
            own["merged_base"] += f"-{len(own['merged'])}"
            own["start"] = None if stage.how == "merge" else left(source) | {"how": stage.how}
        if (source := self.judged_by(number)) is not None:
            own["judge"] = left(source)
        return Job.model_validate(own)

    def _judge_defect(self, number: int) -> str:
        """Why the reward model of this chain must not judge stage `number`; empty where it may."""
        if (judge := self.judged_by(number)) is None:
            return ""
        mine, theirs = ([a.path for a in self.part(n).merged] for n in (number, judge))
        if mine != theirs:
            return f"the reward model of stage {judge + 1} stands on another base: merge both alike"
        foreign = getattr(self, self.stages[number].name).foreign_reward
        if self.starts_from(number) != self.starts_from(judge) and not foreign:
            return (
                f"the reward model of stage {judge + 1} was not trained from what the policy "
                "starts from: train it after, or set foreign_reward = true"
            )
        return ""

    def _line_of(self, number: int) -> list[int]:
        """The stages through which the adapter of stage `number` came, itself last."""
        line, at = [number], self.starts_from(number)
        while at is not None:
            line, at = [at, *line], self.starts_from(at)
        return line

    def text(self) -> str:
        """job.json as it is written. What is as its default is left out: an older image of this
        wire, which knows fewer keys, reads a job that asks nothing new of it."""
        told = {"wire": self.wire} | self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(told, ensure_ascii=False, indent=1) + "\n"

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Job:
        for number in range(len(self.stages) if len(self.stages) > 1 else 0):
            part = self.part(number)
            if defect := chain_defect(part.training, part.lora):
                raise ValueError(f"stage {number + 1}: {defect}")
            if defect := self._judge_defect(number):
                raise ValueError(f"stage {number + 1}: {defect}")
        told = {stage.name for stage in self.stages}
        for name in Sections.model_fields if len(self.stages) > 1 else ():
            if name not in told and getattr(self, name) != getattr(Sections(), name):
                raise ValueError(f"[{name}] says nothing to any stage: remove it")
        return self

    @model_validator(mode="after")
    def _rows_are_the_stages(self) -> Job:
        if len(self.stages) > 1:
            return self  # each was looked at as a job by itself
        defects = (
            format_defect(self.stage, self.data.format),
            method_defect(self.stage, self.training.method),
            section_defect(self.stage, self),
            looks_defect(self.stage, self.training, self.processes),
            optim_defect(self.training, self.processes),
            settings_defect(self.training.method, self.prompt_learning),
            prompt_defect(self.training.method, self.model.precision, self.lora != Lora()),
        )
        if any(defects):
            raise ValueError("; ".join(filter(None, defects)))
        return self

    @model_validator(mode="after")
    def _adapters_are_there(self) -> Job:
        if len(self.stages) > 1:
            return self
        how = None if self.start is None else self.start.how
        if defect := start_defect(how, self.training, self.lora, self.prompt_learning):
            raise ValueError(defect)
        section = getattr(self, self.stage, None)
        for kind, name, held in (
            ("model", "judge", self.judge),
            ("python", "function", self.reward_function),
        ):
            if (getattr(section, name, None) is None) != (held is None):
                raise ValueError(f"{name}: a reward of kind {kind} and its file come together")
        return self

    @model_validator(mode="after")
    def _wire_is_ours(self) -> Job:
        if self.wire != WIRE:
            raise ValueError(
                f"job.json speaks wire {self.wire}, this trainer speaks {WIRE}: use the "
                "image of the same release"
            )
        return self


def _asks_a_model(job: Job, stage: StageName) -> bool:
    return getattr(getattr(job, stage, None), "judge", None) is not None


def _above(held: Any) -> dict[str, Any] | None:
    """What a job tells of a file or folder, as a stage's folder sees it."""
    if held is None:
        return None
    told: dict[str, Any] = held.model_dump()
    return told | ({"path": UP + told["path"]} if told["path"] else {})


def _data_above(data: Data) -> dict[str, Any]:
    files = {"files": [_above(f) for f in data.files], "held_out": _above(data.held_out)}
    return data.model_dump() | files


def chain_defect(training: Training, lora: Lora) -> str:
    """Why a stage of several must not have these settings; empty where it may."""
    if training.method != "lora":
        return f'several stages train adapters: training.method = "{training.method}" is a job'
    if lora.init_lora_weights == "pissa" or lora.use_dora or lora.modules_to_save:
        return "use_dora, modules_to_save and pissa are not taken up by a later stage: leave it out"
    return ""


def optim_defect(training: Training, processes: int) -> str:
    """Why training.optim must not be what it is; empty where it may."""
    if training.optim == "muon" and not training.trains_base:
        return (
            'training.optim = "muon" moves whole matrices: it needs training.method = "full" or '
            '"freeze", an adapter is trained by "adamw"'
        )
    if training.optim != "adamw" and training.method == "full" and processes > 1:
        return (
            f'training.optim = "{training.optim}" needs each matrix in one piece, which several '
            'GPUs with training.method = "full" do not hold: take one GPU, or "adamw"'
        )
    return ""


def looks_defect(stage: StageName, training: Training, processes: int) -> str:
    """Why a job of `stage` must not have these settings on held-out rows; empty where it may."""
    asked = training.asks_for_the_best or ("eval_steps" if training.eval_steps else "")
    if asked and not STAGES[stage].looks:
        return f"training.{asked}: stage {stage} does not look at held-out rows while it trains"
    if training.load_best_model_at_end and training.method == "full" and processes > 1:
        return (
            "training.load_best_model_at_end: a whole model in parts on several GPUs is not kept "
            'twice; take one GPU, or training.method = "lora"'
        )
    return ""


def start_defect(
    how: str | None, training: Training, lora: Lora, prompt_learning: PromptLearning
) -> str:
    """Why a job that takes up an adapter (`how`; None: takes up none) must not have these settings;
    empty where it may."""
    if how is None:
        return ""
    if training.method in PROMPT_METHODS:
        return prompt_start_defect(training.method, how, prompt_learning)
    if training.method != "lora":
        return f'start: an adapter is not trained on by training.method = "{training.method}"'
    if lora.init_lora_weights != "default" or lora.use_rslora or lora.use_dora:
        return "start: its adapter says how lora begins: remove use_rslora, use_dora and the like"
    return ""
