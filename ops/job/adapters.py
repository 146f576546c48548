"""What a job starts from and is judged by, as it travels with it: adapters, a reward function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job.job_file import JobFile
from trainer.wire.adapters import as_told, files_of, judge_defect, peft_type, settings_from
from trainer.wire.job import DataFile
from trainer.wire.tables import REWARD_MODEL

START, JUDGE = "start", "judge"  # their folders on the box
FUNCTION = "reward.py"  # a reward function's file there
FIND = "name a run of results.folder, a folder with an adapter, or an adapter.zip"


@dataclass
class Adapters:
    """`told` are the keys of job.json that say which they are."""

    pushes: list[PushFile] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)


def taken_up(job: JobFile, stage: Path) -> tuple[JobFile, Adapters]:
    """The job with the settings of what it starts from, and its adapters; archives are
    unpacked in `stage`. Raises PreflightError for one that is not there or does not fit."""
    found, start = Adapters(), None if job.start is None else Path(job.start)
    base = Path(job.model.base).name if Path(job.model.base).is_dir() else job.model.base
    base = base if Path(job.model.base).is_dir() else base.partition("@")[0]
    if start is not None:
        with _named("start", start):
            job = _started(job, start, found, stage)
    if (rule := job.judge) is not None and rule.path != REWARD_MODEL:
        judge, foreign = Path(rule.path), getattr(job, job.stage).foreign_reward
        with _named("the reward model", judge):
            if why := judge_defect(judge, start, base, foreign, job.how == "merge"):
                raise PreflightError(
                    f"the reward model {judge} must not judge here: {why}",
                    hint="train it by stage rm from what the policy starts from, or set "
                    f"{job.stage}.foreign_reward = true",
                )
            _add(found, judge, JUDGE, stage)
    if (rule := job.function) is not None:
        _add_function(found, Path(rule.path))
    return job, found


def _started(job: JobFile, start: Path, found: Adapters, stage: Path) -> JobFile:
    """The job with the settings that its start asks for, which is added to `found`. Raises
    OSError, ValueError."""
    _add(found, start, START, stage)
    if job.how == "merge":
        if peft_type(start) != "LORA":
            raise ValueError("it is no LoRA: only a LoRA is merged")
        found.told["merged"] = [found.told.pop(START)]
        return job
    taken = settings_from(start, job.training.method, job.lora, job.prompt_learning, job.how)
    found.told[START]["how"] = job.how
    return job.model_copy(update=taken)


def _add_function(found: Adapters, file: Path) -> None:
    """Raises PreflightError for a file that Python cannot read, or without the function."""
    try:
        text = file.read_bytes()
        parsed = ast.parse(text, str(file))
    except (OSError, SyntaxError, ValueError) as why:
        raise PreflightError(f"the reward function: {why}", hint="mend the file") from why
    names = [n.name for n in parsed.body if isinstance(n, ast.FunctionDef)]
    if "reward" not in names:
        raise PreflightError(
            f"{file} defines {', '.join(names) or 'no function'}, and not reward",
            hint="write `def reward(prompt, answer, expected): return 1.0` in it",
        )
    sha256 = sha256_of(file)
    found.pushes.append(PushFile(file, FUNCTION, sha256))
    told = DataFile(path=FUNCTION, name=file.name, sha256=sha256, size_bytes=len(text))
    found.told["reward_function"] = told.model_dump()


@contextmanager
def _named(what: str, adapter: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as why:
        raise PreflightError(f"{what}: {adapter} holds no adapter: {why}", hint=FIND) from why
    except (OSError, ValueError) as why:
        raise PreflightError(f"{what}: {adapter}: {why}", hint=FIND) from why


def _add(found: Adapters, adapter: Path, to: str, stage: Path) -> None:
    files = files_of(adapter, stage / "adapters" / to)
    found.pushes += [PushFile(p, f"{to}/{p.name}", sha256_of(p)) for p in files]
    name = adapter.parent.name if adapter.name == "adapter.zip" else adapter.name
    found.told[to] = as_told(adapter, to, name)
