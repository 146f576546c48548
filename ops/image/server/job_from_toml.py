"""Inside the image, on a server without a network: a job file as for renting becomes a run folder
as on a rented box.

    python job_from_toml.py paths JOB.toml      host paths that the job reads, one a line
    python job_from_toml.py run JOB.toml RUN_FOLDER [PROCESSES]     writes job.json and its data

`milktea-run` calls it; `ops.job.config`, `ops.job.job_file` and `ops.errors` are in the image,
`trainer.wire.job` is the image's own. The keys that are about money and machines ([offer],
[limits], [image], [results]) are checked and then mean nothing here, but for offer.num_gpus. A base
model is looked for as a folder, then among the installed models, then in the image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ops.errors import ConfigError, MilkteaError
from ops.job.config import JobFile, load
from trainer.data import template as prompt
from trainer.wire.adapters import as_told, files_of, settings_from
from trainer.wire.job import DataFile, Job
from trainer.wire.tables import REWARD_MODEL, loras_of, told_of_chain

OWN_MODELS = Path("/models")  # inside the image


def paths_of(job: JobFile) -> list[Path]:
    """Absolute host paths of data, template and base model folder; existing or not, that is the
    host's to say.
    """
    return list(dict.fromkeys(path for part in job.parts for path in _paths_of(part)))


def _paths_of(job: JobFile) -> list[Path]:
    found = [*job.data.files, *([held] if (held := job.data.held_out_file) else [])]
    template = Path(job.data.template)
    found += [Path(job.start)] if job.start else []
    rules = [rule for rule in (job.judge, job.function) if rule and rule.path != REWARD_MODEL]
    found += [Path(rule.path) for rule in rules]
    return found + ([template] if template.is_absolute() else [])


def model_paths(toml: Path, job: JobFile) -> list[Path]:
    """Where a local base model may lie: `base` taken as a folder beside the job file."""
    base = Path(job.model.base)
    return [base if base.is_absolute() else (toml.parent / base.expanduser()).resolve()]


def write_run(toml: Path, job: JobFile, run: Path, processes: int | None) -> Job:
    """Copy the data into the run folder, point to the model, write job.json. Raises ConfigError or
    FileNotFoundError.
    """
    (run / "data").mkdir(parents=True, exist_ok=True)
    link = run / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(find_model(toml, job))
    taken = [put_adapters(part, run) for part in job.parts]
    parts = [part for part, _ in taken]
    if job.stages:
        loras = loras_of(job.stages, [part.lora for part in parts])
        changed = zip(parts, loras, strict=True)
        parts = [part.model_copy(update={"lora": lora}) for part, lora in changed]
    told = [
        _told(part, run, processes, f"{n}-" if job.stages else "") | adapters
        for n, (part, (_, adapters)) in enumerate(zip(parts, taken, strict=True))
    ]
    wire = Job.model_validate(told_of_chain(job.stages, told) if job.stages else told[0])
    part = run / "job.json.part"
    part.write_text(wire.text(), "utf-8")
    part.replace(run / "job.json")
    return wire


def _told(job: JobFile, run: Path, processes: int | None, before: str) -> dict[str, Any]:
    """job.json's object for a stage by itself, whose data it copies under names that begin with
    `before`. Raises ConfigError or FileNotFoundError."""
    wanted = [*job.data.files, *([held] if (held := job.data.held_out_file) else [])]
    data = [_copy(path, run, f"data/{before}{n}-{path.name}") for n, path in enumerate(wanted)]
    held_out = data.pop() if job.data.held_out_file else None
    template = Path(job.data.template)
    if (
        not template.is_absolute()
        and job.data.template != "chat"
        and job.data.template not in prompt.names()
    ):
        raise ConfigError(
            f"data.template: {job.data.template!r} is none of {', '.join(prompt.names())}, chat, or"
            " a file"
        )
    return {
        "run_id": run.name,
        "stages": [{"name": job.stage}],
        "model": {
            "base": Path(job.model.base).name,
            "path": "model",
            "precision": job.model.precision,
        },
        "data": {
            "files": data,
            "held_out": held_out,
            "template": template.stem if template.is_absolute() else job.data.template,
            "template_text": template.read_text("utf-8") if template.is_absolute() else None,
            **job.data.reading_settings(job.stage),
        },
        "lora": job.lora.model_dump(),
        "prompt_learning": job.prompt_learning.model_dump(),
        "training": job.training.model_dump(),
        "processes": processes or job.offer.num_gpus,
        **job.section_on_box("judge", "reward.py"),
    }


def put_adapters(job: JobFile, run: Path) -> tuple[JobFile, dict[str, object]]:
    """Copies what the job starts from and is judged by into the run folder. Returns the job with
    the settings of its start, and what job.json says of them. Raises ConfigError."""
    own = job.judge is None or job.judge.path == REWARD_MODEL  # an earlier stage makes it
    wanted = {"start": job.start, "judge": None if own or not job.judge else job.judge.path}
    told: dict[str, object] = {}
    for name, path in wanted.items():
        if path is None:
            continue
        adapter = Path(path)
        try:
            if name == "start" and job.how != "merge":
                method, prompt = job.training.method, job.prompt_learning
                taken = settings_from(adapter, method, job.lora, prompt, job.how)
                job = job.model_copy(update=taken)
            for file in files_of(adapter, run / name):
                if adapter.is_dir():
                    (run / name).mkdir(exist_ok=True)
                    shutil.copyfile(file, run / name / file.name)
            one = as_told(adapter, name, adapter.name)
            if name == "start" and job.how == "merge":
                told["merged"] = [one]
            else:
                told[name] = one | ({"how": job.how} if name == "start" else {})
        except (OSError, ValueError) as why:
            raise ConfigError(f"{name}: {adapter}: {why}", hint="name an adapter.zip") from why
    if job.function is not None:
        told["reward_function"] = _copy(Path(job.function.path), run, "reward.py")
    return job, told


def find_model(toml: Path, job: JobFile) -> Path:
    """The folder of the base model. Raises ConfigError that lists what is installed."""
    base = job.model.base.partition("@")[0]
    installed = Path(os.environ.get("MILKTEA_MODELS", "/models")) / "by-name"
    if Path(base).is_absolute():  # a folder of rows may have an installed model's name
        base = Path(base).name
    own = "practice" if Path(base).name == "practice_model" else base  # as the checkout calls it
    for folder in (*model_paths(toml, job), installed / base, OWN_MODELS / own):
        if (folder / "config.json").is_file():
            return folder.resolve()
    names = [str(p.parent.relative_to(installed)) for p in installed.rglob("config.json")]
    have = ", ".join(sorted(names)) or "none"
    raise ConfigError(
        f"model.base: {job.model.base} is neither a folder here nor installed (installed: {have})",
        hint="milktea-run models lists them",
    )


def _copy(source: Path, run: Path, relative: str) -> dict[str, object]:
    target = run / relative
    shutil.copyfile(source, target)
    with target.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return DataFile(
        path=relative, name=source.name, sha256=digest, size_bytes=target.stat().st_size
    ).model_dump()


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["paths"] and len(arguments) == 2:
            toml = Path(arguments[1])
            job = load(toml)
            print(*paths_of(job), *model_paths(toml, job), sep="\n")
        elif arguments[:1] == ["run"] and len(arguments) in (3, 4):
            toml, run = Path(arguments[1]), Path(arguments[2])
            write_run(toml, load(toml), run, int(arguments[3]) if len(arguments) == 4 else None)
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except MilkteaError as error:
        print(f"refused: {error}\ndo this: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"refused: {error}\ndo this: check the paths in {arguments[1]}; relative ones are"
            " relative to it",
            file=sys.stderr,
        )
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
