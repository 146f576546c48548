"""What the plan says about the files that are sent to the rented machine, and which links in a
model's folder are not followed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ops.box.transfer import PushFile
from ops.errors import PreflightError

TRAINER = "trainer/"  # milktea's own files, on the box


def describe(pushes: Sequence[PushFile], template: Path | None = None) -> list[str]:
    """A line for each folder that files are sent from, with links resolved, and one line for
    milktea's own trainer."""
    ours = [p for p in pushes if p.remote.startswith(TRAINER) or "/" not in p.remote]
    yours = [p.local.resolve() for p in pushes if p not in ours]
    yours += [template.resolve()] if template else []
    folders: dict[Path, list[Path]] = {}
    for path in yours:
        folders.setdefault(path.parent, []).append(path)
    lines = [
        f"sends from {folder}: {', '.join(f'{p.name} ({_size(p)})' for p in files)}"
        for folder, files in folders.items()
    ]
    return [*lines, *([f"sends {len(ours)} files of milktea's own trainer"] if ours else [])]


def _size(path: Path) -> str:
    count = float(path.stat().st_size)
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.{1 if unit == 'MB' else 0}f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def validate_links(folder: Path, files: Iterable[Path]) -> None:
    """Raises PreflightError naming the `files` that are links out of `folder`: somebody else may
    have made the folder. Links to ../../blobs are allowed in the hub's cache, which is made of
    them."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    away = [
        f"{path} is a link to {path.resolve()}, outside its folder"
        for path in files
        if not any(path.resolve().is_relative_to(root) for root in roots)
    ]
    if away:
        raise PreflightError(
            "\n".join(away),
            hint="copy what should travel into the folder, and remove the links that should not",
        )
