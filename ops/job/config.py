"""Read a job file: TOML into the models of ops/job/job_file.py, every mistake by its path. Relative
paths in a job file are relative to the job file."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from ops.errors import ConfigError
from ops.job.job_file import JobFile as JobFile
from ops.job.old_cards import with_precision
from trainer.wire.stages import Rollouts
from trainer.wire.tables import REWARD_MODEL, StageTable, chain_mistake, loras_of, parts_of


def load(path: Path) -> JobFile:
    """Read a job file and make its relative paths absolute. Raises ConfigError that lists every
    mistake with its path."""
    return parse(read(path), path)


def read(path: Path) -> dict[str, Any]:
    """The tables of a job file, unchecked. Raises ConfigError for what is no TOML file."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(
            f"{path}: no such job file",
            hint="name yours; milktea's checkout has examples in jobs/ to copy, and `milktea "
            "schema` prints every key",
        ) from e
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    except (ValueError, RecursionError) as e:  # a number of too many digits, endless brackets
        raise ConfigError(f"{path}: not TOML: {e}") from e


def parse(raw: dict[str, Any], path: Path) -> JobFile:
    """As `load`, from a dict. `path` names the file in messages, and relative paths are relative to
    its folder."""
    folder = path.resolve().parent
    if "stages" in raw:
        return _several(raw, path)
    return _with_absolute_paths(_validated(raw, path), folder)


def _validated(raw: dict[str, Any], path: Path, where: str = "") -> JobFile:
    try:
        return JobFile.model_validate(with_precision(raw))
    except ValidationError as e:
        lines = [f"{path}: {where}{_message(err)}" for err in e.errors()]
        raise ConfigError("\n".join(lines)) from e


def _several(raw: dict[str, Any], path: Path) -> JobFile:
    """A file with [[stages]]."""
    try:
        tables = TypeAdapter(list[StageTable]).validate_python(raw["stages"])
    except ValidationError as e:
        lines = [f"{path}: stages.{_message(err)}" for err in e.errors()]
        raise ConfigError("\n".join(lines)) from e
    mistake = chain_mistake(raw, tables) if tables else "stages: it names none"
    if mistake:
        raise ConfigError(f"{path}: {mistake}")
    texts = parts_of(raw, tables)
    for text in texts[:-1]:  # the run's result is that of the last stage
        text["results"] = {k: v for k, v in text.get("results", {}).items() if k != "merged"}
    parts = [_validated(t, path, f"stages.{n}: ") for n, t in enumerate(texts)]
    try:
        loras_of(tables, [part.lora for part in parts])
    except ValueError as e:
        raise ConfigError(f"{path}: stages: {e}") from e
    judged = [any(t.stage == "rm" for t in tables[:n]) for n in range(len(tables))]
    found = [
        _with_absolute_paths(part, path.resolve().parent, own)
        for part, own in zip(parts, judged, strict=True)
    ]
    job = found[-1].model_copy(update={"stages": tables})
    job._parts = found
    return job


def with_max_usd(job: JobFile, max_usd: float) -> JobFile:
    """The same job with limits.max_usd, in each of its stages."""
    limits = job.limits.model_copy(update={"max_usd": max_usd})
    changed = job.model_copy(update={"limits": limits})
    changed._parts = [p.model_copy(update={"limits": limits}) for p in job._parts]
    return changed


def schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors (`#:schema` in Taplo's convention)."""
    return JobFile.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "milktea job",
    }


def keys() -> list[str]:
    """Every key a job file may have, as dotted paths."""
    return [
        f"{n}.{k}" if k else n
        for n, f in JobFile.model_fields.items()
        for k in (_fields_of(f.annotation) or [""])
    ]


def _fields_of(annotation: Any) -> list[str]:
    either = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    sections = [a for a in either if isinstance(a, type) and issubclass(a, BaseModel)]
    return list(sections[0].model_fields) if sections else []


def _message(err: Any) -> str:
    where = ".".join(str(p) for p in err["loc"]) or "job"
    if err["type"] == "extra_forbidden":
        near = [
            k for k in keys() if k.endswith("." + where.split(".")[-1])
        ] or difflib.get_close_matches(where, [*keys(), *JobFile.model_fields], 1, 0.6)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    message = err["msg"].removeprefix("Value error, ")
    given = (
        f" (got {err['input']!r})"
        if err["type"] != "missing" and not isinstance(err["input"], dict)
        else ""
    )
    return f"{where}: {message}{given}"


def _with_absolute_paths(job: JobFile, folder: Path, own_judge: bool = False) -> JobFile:
    """`own_judge`: whether an earlier stage of the file makes a reward model."""

    def here(p: Path) -> Path:
        return (folder / p.expanduser()).resolve()

    data = job.data.model_copy(
        update={
            "files": [here(p) for p in job.data.files],
            "held_out": here(held) if (held := job.data.held_out_file) else job.data.held_out,
            "template": str(here(Path(job.data.template)))
            if "." in job.data.template
            else job.data.template,
        }
    )
    changes: dict[str, Any] = {"mounts": {name: here(p) for name, p in job.mounts.items()}}
    if job.start is not None:
        changes["start"] = str(_adapter(job.start, folder, here(job.results.folder)))
    for name in ("ppo", "grpo"):
        section: Rollouts = getattr(job, name)
        rewards = [
            r.model_copy(
                update={
                    "path": str(
                        here(Path(r.path))
                        if r.kind == "python"
                        else _adapter(r.path, folder, here(job.results.folder))
                    )
                }
            )
            if r.path and not (own_judge and r.kind == "model" and r.path == REWARD_MODEL)
            else r
            for r in section.rewards
        ]
        changes[name] = section.model_copy(update={"rewards": rewards})
    local = here(Path(job.model.base))
    try:
        is_folder = local.is_dir()
    except OSError as error:  # of a name that no file system takes
        raise ConfigError(f"model.base: {error.strerror}: {job.model.base[:80]}...") from error
    model = job.model.model_copy(update={"base": str(local)}) if is_folder else job.model
    results = job.results.model_copy(update={"folder": here(job.results.folder)})
    changes |= {"data": data, "model": model, "results": results}
    if job.image.packages is not None:
        changes["image"] = job.image.model_copy(update={"packages": here(job.image.packages)})
    if job.notify is not None:
        changes["notify"] = job.notify.relative_to(folder)
    return job.model_copy(update=changes)


def _adapter(name: str, folder: Path, results: Path) -> Path:
    """Where the adapter lies that a job file calls `name`: a run's, that of a stage of a run
    (RUN/2-sft), or a path; existing or not."""
    of_run = results / name / "adapter.zip"
    if re.fullmatch(r"[^/]+(/\d+-[a-z]+)?", name) and of_run.is_file():
        return of_run
    path = (folder / Path(name).expanduser()).resolve()
    inside = path / "adapter.zip"
    return inside if inside.is_file() else path
