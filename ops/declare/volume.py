"""A folder of the user's that outlives every box: results come home into it, data go from it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from ops.box.transfer import sha256_of
from ops.errors import ConfigError, PreflightError
from ops.run.folders import project_folder


class Volume:
    """`volumes/NAME` in the project's folder, or `folder`. It is on this disk: vast.ai has nothing
    of it, so it costs nothing and no run loses it. A run's box gets the files that its job names,
    compared by hash there; the result comes home verified, into a folder of the run's id."""

    def __init__(self, name: str, folder: Path | str | None = None) -> None:
        """Raises ConfigError for a name that is no folder's."""
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ConfigError(f"{name!r} is no name of a volume", hint='Volume("insurance")')
        self.name = name
        self.folder = Path(folder or project_folder() / "volumes" / name).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Volume({self.name!r}, {str(self.folder)!r})"

    def path(self, name: str) -> Path:
        """Where `name` lies, existing or not. Raises ConfigError for a way out of the volume."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ConfigError(f"{name!r} leads out of the volume {self.name}", hint="")
        return path

    def files(self) -> dict[str, str]:
        """The sha256 of every file by its name in the volume, sorted; links are no files of it."""
        found = (p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink())
        return {str(p.relative_to(self.folder)): sha256_of(p) for p in sorted(found)}

    def sha256(self) -> str:
        """Of all names and contents together: equal volumes have equal hashes."""
        return hashlib.sha256(json.dumps(self.files()).encode()).hexdigest()

    def put(self, source: Path | str, name: str | None = None) -> Path:
        """Copy a file in, under `name` (its own without it). Raises PreflightError where another
        file has that name."""
        source = Path(source).expanduser()
        return _copied(source, self.path(name or source.name))

    def get(self, name: str, to: Path | str) -> Path:
        """Copy a file, or a folder with all in it, out to `to`: into a folder that exists or is
        named with a slash at its end, else under that name. Every copy is compared by hash. Raises
        PreflightError where it is not there, or where another file has the name."""
        source, goal = self.path(name), Path(to).expanduser()
        if goal.is_dir() or str(to).endswith("/"):
            goal = goal / source.name
        if source.is_dir():
            for path in sorted(p for p in source.rglob("*") if p.is_file()):
                _copied(path, goal / path.relative_to(source))
            return goal
        return _copied(source, goal)

    def rm(self, name: str, *, recursive: bool = False) -> None:
        """Delete a file, or with `recursive` a folder. Raises PreflightError for what is not there,
        and for a folder without `recursive`."""
        path = self.path(name)
        if path == self.folder.resolve():
            raise ConfigError("that is the volume itself", hint="name a file or a folder in it")
        if path.is_dir():
            if not recursive:
                raise PreflightError(f"{name} is a folder", hint=f"rm({name!r}, recursive=True)")
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
        else:
            raise PreflightError(f"{self.name} has no {name}", hint="files() lists what it has")


def _copied(source: Path, goal: Path) -> Path:
    """Copy by a name of its own, compare, rename. A copy that is there already is left alone."""
    if not source.is_file():
        raise PreflightError(f"{source} is not there", hint="files() lists what a volume has")
    wanted = sha256_of(source)
    if goal.exists():
        if goal.is_file() and sha256_of(goal) == wanted:
            return goal
        raise PreflightError(f"{goal} is there and is another", hint="give another name")
    goal.parent.mkdir(parents=True, exist_ok=True)
    part = goal.with_name(f".{goal.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        shutil.copyfile(source, part)
        if (found := sha256_of(part)) != wanted:
            raise PreflightError(f"{goal}: the copy has sha256 {found}, not {wanted}")
        part.replace(goal)
    finally:
        part.unlink(missing_ok=True)
    return goal
