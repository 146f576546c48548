"""Base models for images and bundles: safetensors only, each file by its hash, one identity
whatever the packing.

From a commit of the hub or from a folder. A pickle can run code when it is opened, so none is
taken; the layouts that people still have are converted first (`convert`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ops.errors import PreflightError
from ops.image.fetch import convert
from ops.image.spec.definition import ModelSource
from ops.image.spec.lock import Model, ModelFile, set_digest
from ops.image.spec.paths import link, safe_path
from trainer.wire.digest import sha256_of

Progress = Callable[[str], None]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TAKEN = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", ".vocab", ".bpe")
NAMED = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")


def resolve(source: ModelSource, root: Path, cache: Path, progress: Progress) -> Model:
    """What the source holds now, copied to ``cache`` and pinned. Raises PreflightError where it is
    not a whole, safe model.
    """
    folder = _folder(source, root, cache, progress)
    paths = check(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda path: _as_found(folder, path), paths))
    model = Model(
        name=source.name,
        source=source.source,
        revision=source.revision,
        license=source.license or license_of(folder),
        set_digest=set_digest(files),
        files=files,
    )
    _keep(model, folder, cache)
    return model


def fetch(model: Model, root: Path, cache: Path, progress: Progress) -> Path:
    """The folder with exactly the locked files, each hashed; fetched again where one is missing or
    differs.
    """
    target = where(model, cache)
    if not _missing(model, target):
        return target
    source = ModelSource(name=model.name, source=model.source, revision=model.revision)
    progress(f"fetching model {model.name}")
    folder = _folder(source, root, cache, progress)
    check(folder)
    wrong = _missing(model, folder)
    if wrong:
        raise PreflightError(
            f"model {model.name}: {wrong[0]} of {model.source} is not the locked one ({len(wrong)}"
            f" of {len(model.files)} files differ)",
            hint="make image-lock, if the new files are wanted; else restore the old ones",
        )
    _keep(model, folder, cache)
    return target


def check(folder: Path) -> list[str]:
    """The files of a model that travel, sorted; hidden ones stay. Raises PreflightError for a
    pickle, a torn or a missing file, a link out of the folder, ConfigError for a name that cannot
    travel.
    """
    if not folder.is_dir():
        raise PreflightError(
            f"there is no model folder {folder}",
            hint="download the model, or correct source in images/NAME.toml",
        )
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(x.startswith(".") for x in path.relative_to(folder).parts)
    )
    weights = [path for path in files if path.endswith(".safetensors")]
    if not weights:
        what = "no weights (*.safetensors)"
        if pickle := next((path for path in files if path.endswith(PICKLES)), ""):
            what = f"its weights as pickles ({pickle}), which can run code when they are opened"
        raise PreflightError(
            f"{folder} has {what}",
            hint="take a revision that has safetensors, or convert it on a machine that you trust",
        )
    taken = [path for path in files if path.endswith(TAKEN) or Path(path).name.startswith(NAMED)]
    if "config.json" not in taken:
        raise PreflightError(
            f"{folder} has weights and no config.json", hint="download the model again, all of it"
        )
    if "tokenizer.json" not in taken:
        raise PreflightError(
            f"{folder} has no tokenizer.json, without which nothing trains",
            hint=f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) writes it",
        )
    for path in taken:
        _validate_link(folder, safe_path(path))
    for path in weights:
        validate_safetensors(folder / path)
    _validate_index(folder, weights)
    return taken


def validate_safetensors(path: Path) -> None:
    """Raises PreflightError where the file is not as long as its header says, as a torn download
    is not.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise PreflightError(
            f"{path.name} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}",
            hint="download it again: it broke off",
        ) from error


def license_of(folder: Path) -> str:
    """What the model's card says in its front matter, else the name of its licence file, else
    nothing.
    """
    card = folder / "README.md"
    if card.is_file() and (
        front := re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    ):
        lines: dict[str, str] = dict(
            re.findall(r"^(license\w*):\s*(\S.*)$", front[1], re.MULTILINE)
        )
        if said := lines.get("license_name") or lines.get("license"):
            return said.strip().strip("\"'")
    found = sorted(
        path.name for path in folder.iterdir() if path.name.startswith(("LICENSE", "COPYING"))
    )
    return f"see {found[0]}" if found else ""


def where(model: Model, cache: Path) -> Path:
    return cache / model.set_digest.removeprefix("sha256:")[:16]


def _folder(source: ModelSource, root: Path, cache: Path, progress: Progress) -> Path:
    kind, _, rest = source.source.partition(":")
    if kind == "folder":
        return convert.usable(root / Path(rest).expanduser(), cache, progress)
    from huggingface_hub import snapshot_download  # takes 0.5 s to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not re.fullmatch("[0-9a-f]{40}", source.revision):
        raise PreflightError(
            f"model {source.name}: revision {source.revision!r} is not a commit",
            hint="pin the hub's 40-digit commit",
        )
    progress(f"asking the hub for {rest}@{source.revision[:12]}")
    wanted = [f"*{suffix}" for suffix in TAKEN] + [f"{name}*" for name in NAMED]
    try:
        target = cache / "hub" / f"{rest.replace('/', '--')}-{source.revision[:12]}"
        return Path(
            snapshot_download(
                rest, revision=source.revision, local_dir=target, allow_patterns=wanted
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PreflightError(
            f"model {rest}: the hub gave no answer: {str(error).splitlines()[0][:200]}",
            hint=(
                "HF_ENDPOINT=https://a-mirror sets another hub, HF_TOKEN opens gated models; or"
                ' source = "folder:PATH"'
            ),
        ) from error


def _as_found(folder: Path, path: str) -> ModelFile:
    at = folder / path
    return ModelFile(path=path, sha256=sha256_of(at), size_bytes=at.stat().st_size)


def _missing(model: Model, folder: Path) -> list[str]:
    """Locked files that are not in the folder as locked."""

    def differs(file: ModelFile) -> bool:
        return not (folder / file.path).is_file() or _as_found(folder, file.path) != file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.map(differs, model.files)
        return [file.path for file, differs in zip(model.files, wrong, strict=True) if differs]


def _keep(model: Model, folder: Path, cache: Path) -> None:
    """Puts the files into the cache, by content."""
    target = where(model, cache)
    for file in model.files:
        path = target / file.path
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        link((folder / file.path).resolve(), path)


def _validate_link(folder: Path, path: str) -> None:
    """A link may lead to another file of the folder, or of the hub's cache that the folder is in;
    a stranger's link to a file of this machine would carry that file away."""
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parents[1]
    if not (real := (folder / path).resolve()).is_relative_to(home):
        raise PreflightError(
            f"{folder / path} is a link to {real}, out of the model's folder",
            hint="put the file itself there: cp -L copies what links lead to",
        )


def _validate_index(folder: Path, weights: list[str]) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        named = convert.json_of(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(x, str) for x in named.values()):
            raise PreflightError(
                f"{index} has no weight_map from the names of tensors to files",
                hint="download it again",
            )
        if lost := sorted(set(named.values()) - set(weights)):
            raise PreflightError(
                f"{index.name} names {lost[0]}, which is not there ({len(lost)} missing)",
                hint="download the model again",
            )
