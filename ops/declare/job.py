"""A job declared in Python: what a job file says, by the same models, and what is done with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from shutil import which
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel

from ops import api
from ops.api import Kind, Planned, Screen, Vast
from ops.declare.result import Result
from ops.declare.told import Told
from ops.declare.volume import Volume
from ops.errors import ConfigError, NoOffer
from ops.export.submit import Queued, no_slurm, submit
from ops.job import config
from ops.job.job_file import Data, Image, JobFile, Model

Where = Literal["vast", "here"]
_UNITS = {"s": 1 / 3600, "m": 1 / 60, "h": 1.0, "d": 24.0}  # hours


class Job:
    """One job. `file` is its job file, checked; `files` has one for each count of GPUs that `gpu`
    names, of which `plan` takes the cheapest finished run. Nothing of it changes: `with_` makes
    another job."""

    def __init__(
        self,
        name: str,
        *,
        model: str | Model | Mapping[str, Any],
        data: str | Path | Sequence[str | Path] | Data | Mapping[str, Any],
        timeout: str | timedelta,
        max_usd: float,
        image: str | Image | Mapping[str, Any] | None = None,
        gpu: str | Sequence[str] = (),
        volume: Volume | None = None,
        **sections: Any,
    ) -> None:
        """`timeout` ("6h", "90m", "1d", a timedelta) and `max_usd` have no default: nothing can
        bill for ever. `gpu` names cards that are accepted, with their count ("A100:2"), or none for
        any that holds the job. `image` is a reference that the box pulls. `volume` is where results
        come home. `sections` are those of a job file: lora, training, stage, dpo, offer, limits,
        env, evaluate, ... Relative paths are of the working directory. Raises ConfigError with
        every mistake."""
        given: dict[str, Any] = {"model": model, "data": data, "timeout": timeout, "image": image}
        given |= {"max_usd": max_usd, "gpu": gpu, "volume": volume}
        self._given: dict[str, Any] = {"name": name, **given, **sections}
        self.volume = volume
        tables = _tables(name, given, sections)
        cards = _cards(gpu)
        self.files = [api.load_job(_with_cards(tables, *one)) for one in cards] or [
            api.load_job(tables)
        ]

    @classmethod
    def from_toml(cls, path: str | Path) -> Job:
        """The job of a job file. Raises ConfigError."""
        job = cls.__new__(cls)
        job.files, job.volume, job._given = [config.load(Path(path))], None, {}
        return job

    @property
    def file(self) -> JobFile:
        """Its job file; of several, the first."""
        return self.files[0]

    @property
    def name(self) -> str:
        return self.file.name

    def __repr__(self) -> str:
        return f"Job({self.name!r}, {self.file.model.base!r}, {self.file.limits.max_usd} $)"

    def with_(self, **changes: Any) -> Job:
        """Another job with these arguments; keys of a section are changed one by one:
        `with_(lora=dict(r=8))`. Raises ConfigError."""
        given = self._given or _given_of(self.file)
        merged = {
            name: _raw(given.get(name)) | dict(value)
            if isinstance(value, Mapping) and isinstance(_raw(given.get(name)), dict)
            else value
            for name, value in changes.items()
        }
        return Job(**(given | merged))

    def to_toml(self) -> str:
        """The text of a job file that says the same, with absolute paths. Raises ConfigError for a
        job of several stages, or of several counts of GPUs: a job file has one."""
        if len(self.files) > 1 or self.file.stages:
            raise ConfigError(
                f"{self.name} is more than one job file",
                hint="name one count of GPUs; a job of several stages is a file of its own",
            )
        return tomli_w.dumps(_plain(self.file.model_dump(mode="json", exclude_defaults=True)))

    # -- what is done with it ----------------------------------------------------------------------

    def plan(self, where: Where = "vast", *, vast: Vast | None = None) -> Planned:
        """Check everything, ask the market for every count of GPUs, and return the cheapest
        finished run. Rents nothing; `print` shows it. Raises as `milktea.plan`."""
        vast = vast or _market(where)
        found: list[Planned] = []
        refused: NoOffer | None = None
        for file in self.files:
            try:
                found.append(api.plan(file, vast=vast, on_cpu=_is_here(where)))
            except NoOffer as e:
                refused = e
        if not found:
            assert refused is not None, "a job has a file"
            raise refused
        best = min(found, key=lambda planned: planned.ranking.accepted[0].cost.expected_usd)
        for other in found:
            if other is not best:
                api.drop(other)
        return best

    def remote(
        self,
        where: Where = "vast",
        *,
        detach: bool = False,
        screen: Screen | None = None,
        vast: Vast | None = None,
    ) -> Result:
        """Rent, train, bring the verified result home, destroy, prove; returns then, or with
        `detach` as soon as a process owns the run (`wait` watches it). `where`: a box of vast.ai
        (its emulator without a key), or this computer. Raises as `milktea.rent_and_train`."""
        vast = vast or _market(where)
        planned = self.plan(where, vast=vast)
        run = api.rent_and_train(planned, vast=vast, screen=screen or Told(), detach=detach)
        return Result(run)

    def export(
        self, kind: Kind, to: str | Path = "exports", *, nodes: int = 1, queue: str | None = None
    ) -> list[Path]:
        """Write the same job for a scheduler of yours, as `milktea export`; the files, README
        first. Raises ConfigError, PreflightError."""
        return api.export_job(kind, self.file, Path(to), nodes, queue)

    def submit(
        self, to: str | Path = "exports", *, nodes: int = 1, queue: str | None = None
    ) -> Queued:
        """Hand the job to the Slurm of this machine: `export`, then sbatch. `to` must be a folder
        that all nodes see; `queue` is the partition. Returns at once. Raises as `export`, and
        PreflightError where no sbatch is, or where Slurm refuses."""
        if which("sbatch") is None:
            raise no_slurm("sbatch")
        readme, *_ = self.export("slurm", to, nodes=nodes, queue=queue)
        return submit(readme.parent.resolve())


def _is_here(where: Where) -> bool:
    if where not in ("vast", "here"):
        raise ConfigError(
            f'where = {where!r} is neither "vast" nor "here"',
            hint="job.submit() for a cluster; job.to_toml() and docs/airgap.md for an image",
        )
    return where == "here" or not api.uses_vast_ai()


def _market(where: Where) -> Vast:
    """vast.ai for the key in the environment; for this computer, its emulator."""
    if where == "here" and _is_here(where):
        hidden = ("VAST_API_KEY", "VAST_URL")
        return api.open_market({k: v for k, v in os.environ.items() if k not in hidden})
    _is_here(where)
    return api.open_market()


def _tables(name: str, given: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """A job file's tables of what the user gave."""
    data, model, image = given["data"], given["model"], given["image"]
    tables = {key: _raw(value) for key, value in sections.items() if value is not None}
    tables["name"] = name
    tables["model"] = {"base": model} if isinstance(model, str) else _raw(model)
    if isinstance(data, str | Path):
        tables["data"] = {"files": [str(data)]}
    elif isinstance(data, Data | Mapping):
        tables["data"] = _raw(data)
    else:
        tables["data"] = {"files": [str(path) for path in data]}
    if image is not None:
        tables["image"] = {"ref": image} if isinstance(image, str) else _raw(image)
    limits = {"max_hours": hours(given["timeout"]), "max_usd": given["max_usd"]}
    tables["limits"] = dict(tables.get("limits", {})) | limits
    if (volume := given["volume"]) is not None:
        results = dict(tables.get("results", {}))
        tables["results"] = results | {"folder": str(volume.folder)}
    return tables


def _raw(value: Any) -> Any:
    """A model as the table that made it; anything else as it is."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _given_of(file: JobFile) -> dict[str, Any]:
    """The arguments that make this job file."""
    told = file.model_dump(exclude_defaults=True)
    limits = told.pop("limits")
    told["timeout"] = timedelta(hours=limits.pop("max_hours", file.limits.max_hours))
    told["max_usd"] = limits.pop("max_usd")
    return told | ({"limits": limits} if limits else {})


def _plain(value: Any) -> Any:
    """Without what TOML does not have: None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def hours(timeout: str | timedelta) -> float:
    """Hours of "6h", "90m", "1d", "45s" or a timedelta. Raises ConfigError."""
    if isinstance(timeout, timedelta):
        return timeout.total_seconds() / 3600
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", str(timeout))
    if not match:
        raise ConfigError(f"timeout {timeout!r} is no time", hint='"6h", "90m" or "1d"')
    return float(match[1]) * _UNITS[match[2]]


def _cards(gpu: str | Sequence[str]) -> list[tuple[int, list[str]]]:
    """(count, names) for each count of GPUs that is named, in the order given."""
    found: dict[int, list[str]] = {}
    for word in [gpu] if isinstance(gpu, str) else gpu:
        name, colon, count = word.partition(":")
        if not name.strip() or (colon and not re.fullmatch(r"[1-9]\d?", count)):
            raise ConfigError(f"gpu {word!r} is no card", hint='"RTX 4090", or "A100:2" for two')
        found.setdefault(int(count or 1), []).append(name.strip())
    return list(found.items())


def _with_cards(tables: Mapping[str, Any], count: int, names: list[str]) -> dict[str, Any]:
    offer = dict(tables.get("offer", {})) | {"gpu_name": names, "num_gpus": count}
    return {**tables, "offer": offer}
