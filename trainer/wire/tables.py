"""Pure: the [[stages]] of a job file. Each stage becomes a job file of its own, from which plan,
prices and job.json are made; what a stage does not say, the file says for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from trainer.wire.adapters import TAKEN, lora_on
from trainer.wire.job import Lora, StageHow, Strict
from trainer.wire.stages import Sections, StageName

SHARED = ("data", "lora", "training")  # tables of the file that a stage may change key by key
REWARD_MODEL = "rm"  # as the path of a reward: the reward model of this chain
Gate = Annotated[float, Field(ge=0, le=1)]


class StageTable(Strict):
    """One of [[stages]]."""

    stage: Annotated[StageName, Field(description="What is learned")]
    how: Annotated[
        StageHow,
        Field(description="As the file's: what becomes of the adapter of the stage before"),
    ] = "continue"
    data: Annotated[dict[str, Any], Field(description="Keys of [data] that differ")] = {}
    lora: Annotated[dict[str, Any], Field(description="Keys of [lora] that differ")] = {}
    training: Annotated[dict[str, Any], Field(description="Keys of [training] that differ")] = {}
    min_accuracy: Annotated[
        Gate | None, Field(description="Of held-out rows, or the run ends after this stage")
    ] = None
    max_loss: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Of held-out rows, or the run ends after this stage"),
    ] = None


def parts_of(raw: Mapping[str, Any], tables: Sequence[StageTable]) -> list[dict[str, Any]]:
    """The file of each stage, as if it were alone: without [[stages]], and without the sections of
    other stages. Only the first one has the file's start."""
    parts = []
    for number, table in enumerate(tables):
        part = {k: v for k, v in raw.items() if k not in ("stages", *Sections.model_fields)}
        if table.stage in raw:
            part[table.stage] = raw[table.stage]
        for name in SHARED:
            if changes := getattr(table, name):
                shared = part.get(name)
                part[name] = (shared if isinstance(shared, dict) else {}) | changes
        if number:
            part = {k: v for k, v in part.items() if k not in ("start", "how")}
        parts.append(part | {"stage": table.stage})
    return parts


def chain_mistake(raw: Mapping[str, Any], tables: Sequence[StageTable]) -> str:
    """What no chain may have; empty where it is sound."""
    if "stage" in raw:
        return "stage: a file with [[stages]] names it there"
    for number, table in enumerate(tables):
        where, first = f"stages.{number}", number == 0
        last = number == len(tables) - 1
        if table.how != "continue" and first:
            return f"{where}.how: the first stage takes up what start names: write how beside it"
        if last and (table.min_accuracy is not None or table.max_loss is not None):
            return f"{where}: a gate of the last stage would stop nothing"
        if table.min_accuracy is not None and table.stage not in ("pt", "sft", "rm", "dpo"):
            return f"{where}.min_accuracy: stage {table.stage} measures none"
        if table.max_loss is not None and table.stage not in ("pt", "sft"):
            return f"{where}.max_loss: stage {table.stage} measures none on held-out rows"
        taken = [] if first or table.how != "continue" else [k for k in TAKEN if k in table.lora]
        if taken:
            return (
                f"{where}.lora.{taken[0]}: the adapter of the stage before says it: remove it, or "
                'set how = "stack"'
            )
    told = {table.stage for table in tables}
    others = [name for name in Sections.model_fields if name in raw and name not in told]
    return f"[{others[0]}] says nothing to any stage: remove it" if others else ""


def loras_of(tables: Sequence[StageTable], asked: Sequence[Lora]) -> list[Lora]:
    """What each stage trains: `asked` is the LoRA that its file has. Raises ValueError for what
    does not go together."""
    found: list[Lora] = []
    newest: Lora | None = None  # of the stages that are no reward model
    for table, lora in zip(tables, asked, strict=True):
        made = lora
        if newest is not None:
            told = {name: getattr(newest, name) for name in TAKEN}
            if table.how == "continue":
                made = Lora.model_validate(lora.model_dump() | told)
            elif table.how == "stack":
                made = lora_on(told, lora)
        found.append(made)
        newest = newest if table.stage == "rm" else made
    return found


def told_of_chain(tables: Sequence[StageTable], told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """job.json's object for stages of which each is `told` as a job by itself: its own keys are
    those of the last one."""
    stages = []
    for number, (table, one) in enumerate(zip(tables, told, strict=True)):
        entry = table.model_dump(include={"how", "min_accuracy", "max_loss"})
        entry |= {"name": table.stage}
        if number < len(told) - 1:
            entry |= {name: one[name] for name in SHARED}
        stages.append(entry)
    whole = dict(told[-1])
    for one in told:
        beside = ("start", "merged", "judge", "reward_function", *Sections.model_fields)
        whole |= {name: one[name] for name in beside if name in one}
    return whole | {"stages": stages}
