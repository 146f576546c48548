"""Which result a user names, and on which base it stands. Reads journals and files, acts on
nothing."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.box.transfer import sha256_of
from ops.errors import JournalError, PreflightError
from ops.job.plan import Plan
from ops.run import journal

CONFIG = "adapter_config.json"
_CONFIG_MAX = 100_000_000  # bytes read of it


@dataclass(frozen=True)
class Found:
    """A result at home. `base` is a folder, a hub id or ID@REVISION, "" where nobody knows;
    `held_out` the user's own file of the job, where it is as it was, and `job` the job.json that
    says how it is read."""

    name: str
    adapter: Path  # adapter.zip, or a folder
    base: str = ""
    held_out: Path | None = None
    job: Path | None = None
    precision: str = ""  # in which the training held the base

    @property
    def beside(self) -> Path:
        """The default folder of what is made from it."""
        return self.adapter.parent

    def needs_base(self) -> Found:
        """Returns itself. Raises PreflightError where the base is not known."""
        if not self.base:
            raise PreflightError(
                f"{self.name} does not say which base it stands on",
                hint="--base FOLDER, or --base with the model's id on the hub",
            )
        return self


def of_path(path: Path, runs: Path, base: str | None = None) -> Found:
    """The result in an archive or a folder; one of a run is known by its folder's name. Raises
    PreflightError for what is no result."""
    inner = path / "adapter.zip" if (path / "adapter.zip").is_file() else path
    run = runs / inner.resolve().parent.name
    if (run / journal.FILE).is_file():
        return of_run(run, base, inner)
    if not inner.is_dir() and not zipfile.is_zipfile(inner):
        raise PreflightError(
            f"{path} is no folder and no zip", hint="give a run, an adapter's folder or its zip"
        )
    told = _config(inner).get("base_model_name_or_path")
    return Found(path.name, inner, base or (told if isinstance(told, str) else ""))


def of_run(folder: Path, base: str | None = None, adapter: Path | None = None) -> Found:
    """The result of a run's folder. Raises PreflightError where none is at home."""
    lines = journal.read(folder)
    if not lines:
        raise JournalError(f"{folder.name} has no journal", hint="`milktea status` lists the runs")
    pulled = journal.last(lines, "pulled")
    adapter = adapter or (Path(pulled["adapter"]) if pulled else None)
    if adapter is None:
        raise PreflightError(
            f"{folder.name} has no result at home",
            hint=f"`milktea status {folder.name}` says where it stands",
        )
    if not adapter.exists():
        raise PreflightError(
            f"{adapter} is gone", hint="give the place that it was moved to instead of the run"
        )
    plan = Plan.from_line(lines[0])
    model = plan.wire_job["model"]
    pushed = {p.remote: p for p in plan.pushes}
    config = pushed.get("model/config.json")
    held_out = (plan.wire_job["data"].get("held_out") or {}).get("path")
    asked = pushed.get(held_out) if held_out else None
    same = asked is not None and asked.local.is_file() and sha256_of(asked.local) == asked.sha256
    named = "@".join(filter(None, (model["base"], model.get("revision"))))
    return Found(
        folder.name,
        adapter,
        base or (str(config.local.parent) if config else named),
        asked.local if asked is not None and same else None,
        folder / "job.json" if (folder / "job.json").is_file() else None,
        model.get("precision", ""),
    )


def _config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder or an archive; empty where it has none (a whole model)."""
    try:
        if path.is_dir():
            text = (path / CONFIG).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive, archive.open(CONFIG) as file:
                text = file.read(_CONFIG_MAX)
        told = json.loads(text)
    except (OSError, KeyError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
