"""job.json: the job as the trainer on the box reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ops.box.transfer import PushFile
from ops.errors import ConfigError
from ops.job.adapters import FUNCTION, JUDGE, Adapters
from ops.job.job_file import JobFile
from trainer.data import template as prompt
from trainer.wire.job import Job
from trainer.wire.tables import told_of_chain


def make_wire_job(
    job: JobFile,
    run_id: str,
    parts: list[JobFile],
    files: list[list[PushFile]],
    adapters: list[Adapters],
) -> Job:
    """The job for the box, of one stage or of several. Raises ConfigError."""
    told = [
        _told(part, run_id, of_part, found)
        for part, of_part, found in zip(parts, files, adapters, strict=True)
    ]
    try:
        return Job.model_validate(told_of_chain(job.stages, told) if job.stages else told[0])
    except ValidationError as e:
        raise ConfigError("; ".join(err["msg"] for err in e.errors())) from e


def _told(job: JobFile, run_id: str, files: list[PushFile], adapters: Adapters) -> dict[str, Any]:
    """job.json's object for a stage by itself."""
    data = [
        {
            "path": p.remote,
            "name": p.local.name,
            "sha256": p.sha256,
            "size_bytes": p.local.stat().st_size,
        }
        for p in files
    ]
    held_out = data.pop() if job.data.held_out_file else None
    template, text = template_of(job.data.template)
    local = Path(job.model.base).is_dir()
    base, _, revision = (job.model.base, "", "") if local else job.model.base.partition("@")
    return {
        "run_id": run_id,
        "stages": [{"name": job.stage}],
        "model": {
            "base": Path(base).name if local else base,
            "revision": revision or None,
            "path": "model" if local else None,
            "precision": job.model.precision,
        },
        "data": {
            "files": data,
            "held_out": held_out,
            "template": template,
            "template_text": text,
            **job.data.reading_settings(job.stage),
        },
        "lora": job.lora.model_dump(),
        "prompt_learning": job.prompt_learning.model_dump(),
        "training": job.training.model_dump(),
        "processes": job.offer.num_gpus,
        "environment": job.env,
        **adapters.told,
        **job.section_on_box(JUDGE, FUNCTION),
    }


def template_of(name: str) -> tuple[str, str | None]:
    """(its name, its text where it is a file) of `data.template`. Raises ConfigError."""
    path = Path(name)
    if path.is_absolute():
        if not path.is_file():
            raise ConfigError(f"data.template: no such file: {path}")
        try:
            return path.stem, path.read_text("utf-8")
        except UnicodeDecodeError as e:
            raise ConfigError(
                f"data.template: {path} is not UTF-8: {e}", hint="save it in UTF-8"
            ) from e
    if name != "chat" and name not in prompt.names():
        raise ConfigError(
            f"data.template: {name!r} is none of {', '.join(prompt.names())}, chat, or a file"
        )
    return name, None
