"""Model folders that transformers does not load as they are: converted by trainer.tools, in a
process of its own, or refused in words. Code of a model's publisher never runs, and is never
dropped unsaid.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops.errors import PreflightError
from trainer import families

Progress = Callable[[str], None]


def usable(folder: Path, cache: Path, progress: Progress) -> Path:
    """``folder``, or what it was converted to, kept under ``cache``.

    Raises PreflightError for a model that needs code of its own, or that cannot be converted.
    """
    config = json_of(folder / "config.json")
    kind = (
        "llama"
        if (folder / "params.json").is_file() and not config
        else "chatglm"
        if config.get("model_type") == "chatglm"
        else None
    )
    if kind:
        return convert(kind, folder, cache / "converted" / _stamp(folder), progress)
    validate_code(folder, config, progress)
    return folder


def convert(kind: str, folder: Path, target: Path, progress: Progress) -> Path:
    """Run trainer.tools.convert_KIND on ``folder``; the result appears whole as ``target``."""
    if target.is_dir():
        return target
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    progress(f"converting {folder.name} by trainer.tools.convert_{kind} (minutes for large models)")
    command = [sys.executable, "-m", f"trainer.tools.convert_{kind}", str(folder), str(part)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)
        what, _, remedy = done.stderr.rpartition("refused: ")[2].partition("\ndo this: ")
        raise PreflightError(
            f"{folder}: {what.strip()[-600:]}", hint=remedy.strip() or "its last words are above"
        )
    part.rename(target)
    return target


def validate_code(folder: Path, config: dict[str, Any], progress: Progress) -> None:
    """Raises PreflightError where config.json points to Python files that transformers needs; says
    so where it has the model itself and they are left out.
    """
    if "auto_map" not in config:
        return
    files = ", ".join(sorted(path.name for path in folder.glob("*.py"))) or "files of the hub"
    kind = str(config.get("model_type"))
    if kind not in families.known_types():
        raise PreflightError(
            f"{folder.name} (model_type {kind}) needs code of its publisher ({files}), which is run"
            " nowhere here",
            hint="take a release of it that transformers loads without trust_remote_code",
        )
    progress(f"{folder.name}: {files} stay behind; transformers has {kind} itself")


def json_of(path: Path) -> dict[str, Any]:
    """The object in a file of a model; none where there is no file. Raises PreflightError."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as why:
        raise PreflightError(f"{path} is no JSON object: {why}", hint="download it again") from why
    return found


def _stamp(folder: Path) -> str:
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]
    return hashlib.sha256(repr((str(folder.resolve()), facts)).encode()).hexdigest()[:16]
