"""The lines of docs/airgap.md for containerd and k3s, which use no INSTALL.sh, on a containerd of
the test's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import needs

from ops.image.bundle import bundle
from ops.image.bundle.parts import final_tag

pytestmark = [pytest.mark.docker, pytest.mark.slow]
PAGE = (Path(__file__).parents[2] / "docs/airgap.md").read_text()


@pytest.fixture
def socket() -> Iterator[Path]:
    """The socket of a containerd that has nothing yet."""
    needs("containerd", "ctr", "sha256sum")
    if os.geteuid():
        pytest.skip("containerd wants root")
    folder = Path(f"/var/tmp/milktea-containerd-{uuid.uuid4().hex[:8]}")  # a socket's path is short
    folder.mkdir(mode=0o700)
    at = folder / "sock"
    command = ["containerd", "--root", folder / "root", "--state", folder / "state", "-a", at]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        while subprocess.run(["ctr", "-a", str(at), "version"], capture_output=True).returncode:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield at
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


def line(words: str) -> str:
    """The page's own line that holds this."""
    [found] = re.findall(rf"^    (.*{words}.*)$", PAGE, re.MULTILINE)
    return str(found)


def typed(words: str, folder: Path, socket: Path) -> str:
    """What the page's ``words`` say that are typed in ``folder``."""
    done = subprocess.run(
        ["sh", "-c", words.replace("ctr ", f"ctr -a {socket} ")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("form", ["parts", "oci"])
def test_containerd_imports_the_parts_or_the_one_archive_and_the_image_runs(
    tiny: Any, socket: Path, tmp_path: Path, form: str
) -> None:
    name = final_tag(tiny.made().image)
    if form == "parts":
        tiny.pack(tmp_path / "bundle")
        assert "FAILED" not in typed("sha256sum -c SHA256SUMS", tmp_path / "bundle", socket)
        typed(line("for p in parts"), tmp_path / "bundle", socket)
    else:
        archive = bundle.write_oci(tiny.made(), tmp_path / "tiny.oci.tar")
        typed(line("images import FILE").replace("FILE", str(archive)), tmp_path, socket)
    run = f"ctr -n k8s.io run --rm docker.io/{name} tiny /bin/sh /bin/prove"
    assert "said hello" in typed(run, tmp_path, socket)


@pytest.fixture
def empty_podman() -> Iterator[list[str]]:
    """A podman command with a store of its own, which has nothing yet."""
    needs("podman")
    folder = Path(tempfile.mkdtemp(prefix="milktea-", dir="/var/tmp"))  # it wants a short path
    stores = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]
    yield ["podman", *stores, "--storage-driver=vfs"]
    shutil.rmtree(folder)


def test_podman_takes_the_one_archive_by_the_words_that_skopeo_takes(
    tiny: Any, empty_podman: list[str], tmp_path: Path
) -> None:
    """Both are made of one library, containers/image."""
    assert "skopeo copy oci-archive:FILE" in line("skopeo copy")
    archive = bundle.write_oci(tiny.made(), tmp_path / "tiny.oci.tar")
    pull = [*empty_podman, "pull", "-q", f"oci-archive:{archive}"]
    done = subprocess.run(pull, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"sha256:{done.stdout.strip()}" == tiny.made().image.config_digest
