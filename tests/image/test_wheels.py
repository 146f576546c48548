"""Wheels go where pip puts them: a real pip is the judge."""

import subprocess
import sys
import zipfile

import pytest
from image_world import make_wheel

from ops.image import wheels
from ops.image.wheels import BadWheel

SITE = "opt/venv/lib/python3.11/site-packages"
ENTRY_POINTS = "[console_scripts]\nrun-it = pkg.cli:main\nsub = pkg.cli:Group.run [extra]\n\n[gui_scripts]\nwindow = pkg.gui:main\n"


@pytest.fixture
def whl(tmp_path):
    files = {
        "pkg/__init__.py": b"x = 1\n",
        "pkg/bin/tool": b"\x7fELF",
        "pkg/tests/test_x.py": b"",
        "pkg-1.5.data/scripts/script": b"#!python -u\nprint(1)\n",
        "pkg-1.5.data/scripts/shell": b"#!/bin/sh\n",
        "pkg-1.5.data/scripts/run-it": b"#!python\nan old launcher\n",
        "pkg-1.5.data/data/share/doc.txt": b"doc",
        "pkg-1.5.data/purelib/extra.py": b"y = 2\n",
        "pkg-1.5.data/headers/pkg.h": b"int x;\n",
    }
    return make_wheel(tmp_path, "pkg", "1.5", files, ENTRY_POINTS, executable=("pkg/bin/tool",))


def test_every_file_mode_and_byte_is_what_pip_installs(whl, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(whl.parent), "--no-deps", "--no-compile",
               "--ignore-installed", "--root-user-action=ignore", "--no-warn-script-location", "--root", str(tmp_path / "root"),
               "--prefix", "/opt/venv", "pkg==1.5"]
    subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)})
    root = tmp_path / "root"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    pip = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    ours = {entry.path: entry for entry in wheels.place(whl, version.removeprefix("python"))}
    assert sorted(ours) == sorted(pip)
    for path, entry in ours.items():
        data = entry.data if entry.data is not None else zipfile.ZipFile(whl).read(entry.member)
        assert (path, entry.mode) == (path, pip[path].stat().st_mode & 0o7777)
        if path.endswith("RECORD"):
            assert unhashed(data) == unhashed(pip[path].read_bytes())
        else:
            assert (path, data) == (path, pip[path].read_bytes().replace(sys.executable.encode(), wheels.PYTHON.encode()))


def unhashed(record):
    """RECORD without the hashes of launchers, which name this test's own Python."""
    return [line for line in record.decode().splitlines() if "/bin/" not in line or "scripts" in line]


def test_pruned_files_are_left_out_by_their_place_below_site_packages(whl):
    kept = {entry.path for entry in wheels.place(whl, "3.11", ["pkg/tests/*", "bin/shell"])}
    everything = {entry.path for entry in wheels.place(whl, "3.11")}
    assert everything - kept == {f"{SITE}/pkg/tests/test_x.py", "opt/venv/bin/shell"}
    assert wheels.pruned_bytes(whl, "3.11", ["pkg/bin/*"]) == 4


def test_the_licence_is_read_from_the_metadata(whl):
    assert wheels.about(whl) == wheels.About("pkg", "1.5", "MIT")


@pytest.mark.parametrize("name", ["../escape.py", "/etc/passwd", "pkg-1.5.data/scripts/../../../x"])
def test_a_member_that_points_outside_is_refused(tmp_path, name):
    path = make_wheel(tmp_path, "pkg", "1.5", {name: b""})
    with pytest.raises(BadWheel, match=r"points outside|no scheme"):
        wheels.place(path, "3.11")


def test_a_half_downloaded_wheel_is_named(whl):
    whl.write_bytes(whl.read_bytes()[:700])
    with pytest.raises(BadWheel, match=r"pkg-1\.5-py3-none-any\.whl is not a whole wheel"):
        wheels.about(whl)
