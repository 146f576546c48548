"""Which files travel to the box: data, base model, adapters, and the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job import sent
from ops.job.adapters import Adapters
from ops.job.data_files import data_files
from ops.job.job_file import JobFile
from ops.job.packages import packages
from trainer.data import prepare
from trainer.data.errors import InvalidJob
from trainer.data.weights import validate_weights

TRAINER_SUFFIXES = (".py", ".toml", ".html")
MOUNTS = "mounts"  # their folder on the box
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def pushes_of(
    job: JobFile, files: list[list[PushFile]], adapters: list[Adapters]
) -> list[PushFile]:
    """Whatever travels to the box: data, base, adapters, the trainer where the image has none."""
    return [
        *{p.remote: p for of_part in files for p in of_part}.values(),
        *model_files(job),
        *mounts(job),
        *packages(job),
        *(push for found in adapters for push in found.pushes),
        *(trainer_files() if job.image.trainer == "push" else []),
    ]


def model_files(job: JobFile) -> list[PushFile]:
    """The base model's files where it is a folder here. Raises PreflightError."""
    folder = Path(job.model.base)
    if not folder.is_dir():
        return []
    files = [p for pattern in MODEL_FILES for p in sorted(folder.glob(pattern))]
    if not any(p.suffix == ".safetensors" for p in files):
        raise PreflightError(
            f"{folder} holds no .safetensors file (pickled weights are not taken)",
            hint="save the model with save_pretrained, or name a hub model",
        )
    sent.validate_links(folder, files)
    try:
        validate_weights(folder)
    except InvalidJob as e:
        raise PreflightError(f"{e}", hint=e.hint) from e
    return [PushFile(p, f"model/{p.name}", sha256_of(p)) for p in files]


def mounts(job: JobFile) -> list[PushFile]:
    """The files that the user sends beside. Raises PreflightError for one that is not there."""
    for name, path in job.mounts.items():
        if not path.is_file():
            raise PreflightError(f"mounts: {name!r}: {path} is no file", hint="name each file")
    return [PushFile(p, f"{MOUNTS}/{name}", sha256_of(p)) for name, p in job.mounts.items()]


def trainer_files() -> list[PushFile]:
    """Our trainer, and what starts it in an image that does not hold it."""
    folder = Path(prepare.__file__).parents[1]
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in TRAINER_SUFFIXES]
    start = Path(__file__).parents[1] / "box" / "bootstrap"
    return [
        *(PushFile(p, f"trainer/{p.relative_to(folder)}", sha256_of(p)) for p in files),
        *(PushFile(p, p.name, sha256_of(p)) for p in sorted(start.iterdir()) if p.is_file()),
    ]


def files_of_parts(parts: list[JobFile], folder: Path) -> list[list[PushFile]]:
    """The data files of each stage; a file of two is sent once."""
    found: list[list[PushFile]] = []
    sent_as: dict[tuple[str, str], str] = {}  # (sha256, how its name ends) -> where on the box
    for part in parts:
        files = data_files(part, folder, first=sum(map(len, found)))
        known = [sent_as.setdefault((p.sha256, Path(p.remote).suffix), p.remote) for p in files]
        found.append([replace(p, remote=r) for p, r in zip(files, known, strict=True)])
    return found
