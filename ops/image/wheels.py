"""Where the files of a wheel go, as `pip install --no-compile` puts them, so that the assembled image is what pip would make.

The rules are the wheel format's (packaging.python.org, "Binary distribution format") and pip's: RECORD is rewritten with the
launchers, INSTALLER and REQUESTED are added, executable bits come from the zip. tests/image compares with a real pip, byte by
byte.
"""

from __future__ import annotations

import base64
import configparser
import csv
import email
import fnmatch
import hashlib
import io
import posixpath
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ops.image.layers import Entry

VENV = "opt/venv"
PYTHON = f"/{VENV}/bin/python"
LAUNCHER = """#!{python}
import sys
from {module} import {name}
if __name__ == '__main__':
    sys.argv[0] = sys.argv[0].removesuffix('.exe')
    sys.exit({call}())
"""


class BadWheel(ValueError):
    """A wheel that cannot be installed as the format says; the message names the file."""


@dataclass(frozen=True)
class About:
    """What a wheel says of itself. ``license`` is its SPDX expression where it has one, else its classifiers or text's first
    line."""

    name: str
    version: str
    license: str


def site_packages(python: str) -> str:
    return f"{VENV}/lib/python{python}/site-packages"


def normalize(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def about(path: Path) -> About:
    """Raises BadWheel where METADATA is missing, which is how a half-downloaded file shows too."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = _dist_info(path, archive)
            meta = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise BadWheel(f"{path.name} is not a whole wheel: {error}") from error
    return About(normalize(meta["Name"]), meta["Version"], _license(meta))


def place(path: Path, python: str, prune: Sequence[str] = ()) -> list[Entry]:
    """The entries that this wheel adds to the image, pruned ones left out; raises BadWheel.

    ``prune`` are shell patterns over the path below site-packages (or below the venv, as ``bin/NAME``).
    """
    site = site_packages(python)
    with zipfile.ZipFile(path) as archive:
        info = _dist_info(path, archive)
        scripts = _entry_points(archive, info)
        placed: dict[str, Entry] = {}
        moved: dict[str, Entry] = {}
        for member in archive.infolist():
            if member.is_dir() or member.filename == f"{info}/RECORD":
                continue
            target = _target(path, member.filename, info, site, python)
            name = posixpath.basename(target)
            if _is_script(member.filename, info):
                if name.removesuffix(".exe").removesuffix("-script.py").removesuffix(".pya") in scripts:
                    continue
                entry = Entry(target, _mode(member), _script(archive.read(member)))
            else:
                entry = Entry(target, _mode(member), archive=path, member=member)
            placed[target] = moved[member.filename] = entry
        made = [Entry(f"{VENV}/bin/{name}", 0o755, _launcher(path, name, where)) for name, where in scripts.items()]
        made += [Entry(f"{site}/{info}/INSTALLER", data=b"pip\n"), Entry(f"{site}/{info}/REQUESTED", data=b"")]
        record = _record(archive.read(f"{info}/RECORD").decode(), moved, made, site)
    placed |= {entry.path: entry for entry in made}
    placed[f"{site}/{info}/RECORD"] = Entry(f"{site}/{info}/RECORD", data=record)
    keep = _keeper(tuple(prune))
    return [entry for entry in placed.values() if keep(_below(entry.path, site))]


def venv_skeleton(python: str) -> list[Entry]:
    """The virtual environment around the packages; its Python is Debian's."""
    config = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\nexecutable = /usr/bin/python{python}\n"
    links = {"python": f"/usr/bin/python{python}", "python3": "python", f"python{python}": "python"}
    return [
        Entry(f"{VENV}/pyvenv.cfg", data=config.encode()),
        *(Entry(f"{VENV}/bin/{name}", link=target) for name, target in sorted(links.items())),
        Entry(f"{VENV}/lib64", link="lib"),
        Entry(site_packages(python), 0o755),
    ]


def pruned_bytes(path: Path, python: str, prune: Sequence[str]) -> int:
    """How much the patterns leave out of this wheel."""
    if not prune:
        return 0
    return sum(entry.size for entry in place(path, python)) - sum(entry.size for entry in place(path, python, prune))


def _dist_info(path: Path, archive: zipfile.ZipFile) -> str:
    found = {name.split("/", 1)[0] for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1}
    if len(found) != 1:
        raise BadWheel(f"{path.name} has {len(found)} .dist-info folders, a wheel has one")
    return found.pop()


def _target(path: Path, name: str, info: str, site: str, python: str) -> str:
    """Where a member goes, relative to the root; refuses one that would leave its place."""
    clean = posixpath.normpath(name)
    if clean.startswith(("/", "../")) or clean == "..":
        raise BadWheel(f"{path.name}: {name!r} points outside of the package")
    data = info.removesuffix(".dist-info") + ".data/"
    if not clean.startswith(data):
        return f"{site}/{clean}"
    scheme, _, rest = clean.removeprefix(data).partition("/")
    package = info.split("-", 1)[0]
    roots = {"purelib": site, "platlib": site, "scripts": f"{VENV}/bin", "data": VENV,
             "headers": f"{VENV}/include/site/python{python}/{package}"}
    if scheme not in roots or not rest:
        raise BadWheel(f"{path.name}: {name!r} is of no scheme that wheels have ({', '.join(sorted(roots))})")
    return f"{roots[scheme]}/{rest}"


def _is_script(name: str, info: str) -> bool:
    return name.startswith(info.removesuffix(".dist-info") + ".data/scripts/")


def _mode(member: zipfile.ZipInfo) -> int:
    """Executable where the zip says so of a regular file; nothing else of its mode counts."""
    mode = member.external_attr >> 16
    return 0o755 if mode & 0o111 and mode & 0o170000 in (0, 0o100000) else 0o644


def _script(data: bytes) -> bytes:
    first, newline, rest = data.partition(b"\n")
    return b"#!" + PYTHON.encode() + newline + rest if first.startswith(b"#!python") else data


def _entry_points(archive: zipfile.ZipFile, info: str) -> dict[str, str]:
    try:
        text = archive.read(f"{info}/entry_points.txt").decode()
    except KeyError:
        return {}
    parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(text)
    return {name: where for part in ("console_scripts", "gui_scripts") if part in parser for name, where in parser[part].items()}


def _launcher(path: Path, name: str, where: str) -> bytes:
    matched = re.fullmatch(r"([\w.]+)\s*:\s*([\w.]+)\s*(\[.*\])?", where)
    if not matched:
        raise BadWheel(f"{path.name}: the entry point {name} = {where} names no function")
    module, call = matched[1], matched[2]
    return LAUNCHER.format(python=PYTHON, module=module, name=call.split(".")[0], call=call).encode()


def _record(text: str, moved: dict[str, Entry], made: list[Entry], site: str) -> bytes:
    """RECORD as pip writes it: paths where the files went, hashes of what changed, sorted."""
    rows = []
    for path, digest, size, *_ in (row + ["", ""] for row in csv.reader(text.splitlines()) if row):
        entry = moved.get(path)
        if entry is not None and entry.data is not None:
            rows.append((_from_site(entry.path, site), *_hashed(entry.data)))
        else:
            rows.append((_from_site(entry.path, site) if entry else path, digest, size))
    rows += [(_from_site(entry.path, site), *_hashed(entry.data or b"")) for entry in made]
    known = {row[0] for row in rows}
    rows += [(where, "", "") for entry in moved.values() if (where := _from_site(entry.path, site)) not in known]
    out = io.StringIO(newline="")
    csv.writer(out).writerows(sorted(rows))
    return out.getvalue().encode()


def _from_site(path: str, site: str) -> str:
    """posixpath.relpath, which is slow, only for what is not below site-packages."""
    return path.removeprefix(site + "/") if path.startswith(site + "/") else posixpath.relpath(path, site)


def _hashed(data: bytes) -> tuple[str, str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"sha256={digest}", str(len(data))


def _below(path: str, site: str) -> str:
    return path.removeprefix(site + "/") if path.startswith(site + "/") else path.removeprefix(VENV + "/")


@cache
def _keeper(prune: tuple[str, ...]) -> Callable[[str], bool]:
    if not prune:
        return lambda path: True
    pattern = re.compile("|".join(fnmatch.translate(glob) for glob in prune))
    return lambda path: not pattern.match(path)


def _license(meta: email.message.Message) -> str:
    if expression := str(meta.get("License-Expression") or ""):
        return " ".join(expression.split())
    classifiers = [str(line) for line in meta.get_all("Classifier", [])]
    named = [line.rpartition("::")[2].strip() for line in classifiers if line.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    first = str(meta.get("License") or "").strip().splitlines()
    return " AND ".join(sorted(named)) or (first[0][:80] if first else "")
