"""The keys of a job file, as frozen pydantic models: an unknown key, a wrong type or a
contradiction is an error.

`lora` and `training` are the wire's models (trainer/wire/job.py), so that a setting has one name
from the file to the GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ops.job.afterwards import Evaluate, PositiveFloat, Results
from ops.job.notify import Notify
from trainer.wire.job import (
    MOST_STAGES,
    BadRows,
    Column,
    DataFormat,
    EnvironmentName,
    Lora,
    OverLength,
    Positive,
    Precision,
    StageHow,
    Strict,
    Training,
    TrainOn,
    looks_defect,
    optim_defect,
    start_defect,
)
from trainer.wire.prompts import PromptLearning, prompt_defect, settings_defect
from trainer.wire.stages import (
    STAGES,
    Reward,
    Rollouts,
    Sections,
    StageName,
    format_defect,
    method_defect,
    section_defect,
    section_of,
)
from trainer.wire.tables import StageTable

HELD_OUT_SHARE = 0.02  # of the rows, where data.held_out is left out
MACHINE_HAS_OWN = "the machine has its own"
LOADER_PREFIXES = ("LD_", "MILKTEA_", "PYTHON")  # variables that change how programs start
NEVER_SENT = {
    "VAST_API_KEY": "it is the key to your account's money",
    "CONTAINER_API_KEY": MACHINE_HAS_OWN,
    "CONTAINER_ID": MACHINE_HAS_OWN,
    "PATH": MACHINE_HAS_OWN,
    "HOME": MACHINE_HAS_OWN,
}


class Model(Strict):
    base: Annotated[
        str,
        Field(
            description="A local folder, or a model of the Hugging Face hub as NAME or "
            "NAME@REVISION"
        ),
    ]
    precision: Annotated[
        Precision,
        Field(
            description="How the frozen base is held: fp32, bf16, fp16, fp8, nf4 or int8; left out "
            "beside cards before Ampere alone, fp16"
        ),
    ] = "bf16"


class Data(Strict):
    files: Annotated[list[Path], Field(min_length=1, description="Rows to train on")]
    held_out: Annotated[
        Literal["auto", "none"] | Path,
        Field(
            description="A file of rows to score before and after, never trained on; auto: 2 % of "
            "the rows, at most 200, of at least 100"
        ),
    ] = "auto"
    format: Annotated[DataFormat, Field(description="auto looks at the first row")] = "auto"
    template: Annotated[
        str, Field(description="A template's name, a template file, or chat: the tokenizer's own")
    ] = "alpaca"
    max_length: Annotated[
        Positive, Field(description="Tokens of one row, prompt and response together")
    ] = 2048
    over_length: Annotated[
        OverLength,
        Field(
            description="What to do with a longer row; truncate keeps the stop token, split makes "
            "several of a conversation"
        ),
    ] = "refuse"
    train_on: Annotated[
        TrainOn, Field(description="Answers of a conversation that are learned: all, or the last")
    ] = "all"
    enable_thinking: Annotated[
        bool | None,
        Field(description="The chat template's flag at inference; left out, as each answer is"),
    ] = None

    columns: Annotated[
        dict[Column, str], Field(description="What the files call a column: { output = 'answer' }")
    ] = {}
    fill: Annotated[
        dict[str, str], Field(description="What stands for {{name}} in a text: { name = 'Tea' }")
    ] = {}
    bad_rows: Annotated[
        BadRows, Field(description="A row that is not sound: refuse the job, or drop the row")
    ] = "refuse"

    @property
    def held_out_file(self) -> Path | None:
        return self.held_out if isinstance(self.held_out, Path) else None

    def reading_settings(self, stage: StageName) -> dict[str, Any]:
        """The settings for reading the rows of a job of `stage`, by the names of the wire's
        Data."""
        told = self.model_dump(mode="json", exclude={"files", "held_out", "template"})
        splits = self.held_out == "auto" and STAGES[stage].splits
        return told | {"held_out_share": HELD_OUT_SHARE if splits else 0.0}


class OfferRequirements(Strict):
    gpu_name: Annotated[
        list[str],
        Field(description="Accept only these, by vast.ai's names; empty accepts any that fits"),
    ] = []
    min_gpu_memory_gib: Annotated[
        PositiveFloat | None, Field(description="Of one GPU; left out, it is predicted")
    ] = None
    num_gpus: Annotated[
        Positive, Field(description="GPUs in one machine; the batch is shared among them")
    ] = 1
    max_usd_per_hour: Annotated[PositiveFloat | None, Field(description="Of the whole machine")] = (
        None
    )
    min_reliability: Annotated[float, Field(ge=0, le=1)] = 0.95
    countries: Annotated[list[str], Field(description="Two-letter codes; empty accepts all")] = []
    min_inet_down_mbps: Annotated[float, Field(ge=0, description="Megabits a second")] = 100.0
    min_cuda: Annotated[
        float, Field(ge=0, description="Of the host's driver; the image must not need more")
    ] = 12.8
    type: Annotated[
        Literal["on-demand", "interruptible"],
        Field(description="interruptible is cheaper and may be taken away"),
    ] = "on-demand"
    bid_usd_per_hour: Annotated[
        PositiveFloat | None,
        Field(description="For interruptible; left out, 20 % over the minimum bid"),
    ] = None
    disk_gib: Annotated[
        Annotated[int, Field(ge=8)] | None, Field(description="Left out, it is predicted")
    ] = None
    min_cpu_ram_gib: Annotated[
        PositiveFloat | None,
        Field(description="Host memory that is ours; left out, it is predicted"),
    ] = None

    @field_validator("countries")
    @classmethod
    def _two_letters(cls, codes: list[str]) -> list[str]:
        bad = [c for c in codes if len(c) != 2 or not c.isalpha()]
        if bad:
            raise ValueError(f"{bad[0]!r} is not a two-letter country code such as US or DE")
        return [c.upper() for c in codes]

    @model_validator(mode="after")
    def _bid_needs_interruptible(self) -> OfferRequirements:
        if self.bid_usd_per_hour and self.type == "on-demand":
            raise ValueError('bid_usd_per_hour needs type = "interruptible"')
        return self


class Limits(Strict):
    max_usd: Annotated[
        PositiveFloat,
        Field(description="Of the whole run, all machines; the box itself keeps to it as well"),
    ]
    max_hours: Annotated[PositiveFloat, Field(description="From rent to destroy")] = 6.0
    stall_minutes: Annotated[
        PositiveFloat, Field(description="Without any event, a training is given up")
    ] = 15.0
    when_silent: Annotated[
        Literal["finish", "destroy"],
        Field(
            description="When no client is heard after the launch: finish the training and keep "
            "the result until max_usd or max_hours, or destroy the machine after ten minutes"
        ),
    ] = "finish"
    hold_minutes: Annotated[
        Annotated[float, Field(ge=10)] | None,
        Field(description="With finish: an ended training is kept for so long without a client"),
    ] = None

    @model_validator(mode="after")
    def _hold_needs_finish(self) -> Limits:
        if self.hold_minutes is not None and self.when_silent == "destroy":
            raise ValueError('hold_minutes needs when_silent = "finish"')
        return self


class Image(Strict):
    ref: Annotated[str, Field(description="What the machine pulls")] = (
        "pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime"
    )
    trainer: Annotated[
        Literal["push", "image"],
        Field(description="push: ours travels with the data; image: the image holds it"),
    ] = "push"
    size_gib: Annotated[
        PositiveFloat, Field(description="Compressed, for the prediction of pull time and disk")
    ] = 4.0
    login: Annotated[
        EnvironmentName | None,
        Field(description="Variable here that holds USER:TOKEN of a private image's registry"),
    ] = None
    packages: Annotated[
        Path | None,
        Field(description="A requirements file, every line pinned: installed beside the trainer's"),
    ] = None

    @model_validator(mode="after")
    def _packages_need_push(self) -> Image:
        if self.packages is not None and self.trainer == "image":
            raise ValueError(
                'packages need trainer = "push": an image that holds its trainer is taken as it '
                "is, without a network; put them into your own image"
            )
        return self


class JobFile(Strict, Sections):
    """A parsed job file."""

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="Run ids begin with it")
    ]
    stage: Annotated[StageName, Field(description="What is learned from the rows")] = "sft"
    stages: Annotated[
        list[StageTable],
        Field(max_length=MOST_STAGES, description="Several, one after the other on one machine"),
    ] = []
    start: Annotated[
        str | None,
        Field(
            description="Adapter to start from: a run of results.folder, a folder or an archive; "
            "left out, a fresh one on the base"
        ),
    ] = None
    how: Annotated[
        StageHow,
        Field(
            description="continue: train on that adapter; stack: leave it, train one beside it; "
            "merge: into the base, and train a fresh one"
        ),
    ] = "continue"
    env: Annotated[
        list[EnvironmentName],
        Field(description="Variables here that the machine gets at launch, such as HF_TOKEN"),
    ] = []
    mounts: Annotated[
        dict[str, Path],
        Field(
            description="Files of yours by the name that they have in mounts/ of the run's folder"
        ),
    ] = {}
    model: Model
    data: Data
    lora: Lora = Lora()
    prompt_learning: PromptLearning = PromptLearning()
    training: Training = Training()
    offer: OfferRequirements = OfferRequirements()
    limits: Limits
    image: Image = Image()
    evaluate: Annotated[
        Evaluate | None,
        Field(description="Score the result beside its base on the box; left out, it is not"),
    ] = None
    results: Results = Results()
    notify: Annotated[
        Notify | None, Field(description="Who is told how the run goes; left out, nobody")
    ] = None
    _parts: list[JobFile] = PrivateAttr(default_factory=list)

    @property
    def parts(self) -> list[JobFile]:
        """The file of each of its stages; of one without [[stages]] itself. With them, this file's
        own keys are those of the last stage."""
        return self._parts or [self]

    @field_validator("mounts")
    @classmethod
    def _stay_in_their_folder(cls, mounts: dict[str, Path]) -> dict[str, Path]:
        for name in mounts:
            if not re.fullmatch(r"(?!\.\.?(/|$))[\w.-]+(/(?!\.\.?(/|$))[\w.-]+)*", name, re.ASCII):
                raise ValueError(
                    f"{name!r} is no plain name of a file: letters, digits, . _ - and /"
                )
        return mounts

    @field_validator("env")
    @classmethod
    def _may_travel(cls, names: list[str]) -> list[str]:
        for name in names:
            if name in NEVER_SENT or name.startswith(LOADER_PREFIXES):
                raise ValueError(f"{name} does not travel: {NEVER_SENT.get(name, MACHINE_HAS_OWN)}")
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _no_contradiction(self) -> JobFile:
        if self.training.trains_base and self.model.precision in ("fp8", "nf4", "int8"):
            raise ValueError(
                f'training.method = "{self.training.method}" trains base weights: '
                "model.precision must be bf16, fp16 or fp32"
            )
        if self.training.batch_size < self.offer.num_gpus:
            raise ValueError(
                f"training.batch_size = {self.training.batch_size} leaves some of "
                f"{self.offer.num_gpus} GPUs without a row"
            )
        if defect := format_defect(self.stage, self.data.format):
            raise ValueError(f"data.format: {defect}")
        if defect := method_defect(self.stage, self.training.method):
            raise ValueError(defect)
        if defect := section_defect(self.stage, self):
            raise ValueError(defect)
        if defect := settings_defect(self.training.method, self.prompt_learning):
            raise ValueError(defect)
        told = self.lora != Lora()
        if defect := prompt_defect(self.training.method, self.model.precision, told):
            raise ValueError(defect)
        how = self.how if self.takes_up else None
        if defect := start_defect(how, self.training, self.lora, self.prompt_learning):
            raise ValueError(defect)
        if defect := looks_defect(self.stage, self.training, self.offer.num_gpus):
            raise ValueError(defect)
        if defect := optim_defect(self.training, self.offer.num_gpus):
            raise ValueError(defect)
        if self.data.held_out == "none" and (asked := self.training.asks_for_the_best):
            raise ValueError(f'training.{asked}: data.held_out = "none" leaves nothing to look at')
        if self.evaluate is not None and self.data.held_out_file is None:
            raise ValueError("[evaluate] asks the rows of a file: name it in data.held_out")
        if self.results.merged and (why := self._unmergeable):
            raise ValueError(f"results.merged: {why}")
        if self.start is None and self.how != "continue":
            raise ValueError(f'how = "{self.how}" needs start')
        return self

    @property
    def _unmergeable(self) -> str:
        """Why the result of this stage is no LoRA that is merged into a model that answers."""
        if self.training.trains_base:
            return f'training.method = "{self.training.method}" leaves a whole model'
        if self.training.method != "lora":
            return f'training.method = "{self.training.method}" leaves a learned prompt'
        return "a reward model is not merged" if self.stage == "rm" else ""

    @property
    def takes_up(self) -> bool:
        """Whether an adapter is trained on, or beside."""
        return self.start is not None and self.how != "merge"

    @property
    def rollouts(self) -> Rollouts | None:
        """The section of a stage that learns from the model's own answers."""
        section = getattr(self, self.stage, None)
        return section if isinstance(section, Rollouts) else None

    @property
    def judge(self) -> Reward | None:
        """The reward that asks a model, if the job's stage has one."""
        return self.rollouts.judge if self.rollouts else None

    @property
    def function(self) -> Reward | None:
        """The reward that asks a function, if the job's stage has one."""
        return self.rollouts.function if self.rollouts else None

    def section_on_box(self, judge: str, function: str) -> dict[str, dict[str, Any]]:
        """The section of the job's own stage as the wire has it, with where the reward model and
        the file of the reward function lie on the box."""
        told, places = section_of(self), {"model": judge, "python": function}
        for rule in told.get(self.stage, {}).get("rewards", []):
            rule["path"] = places.get(rule["kind"], "")
        return told
