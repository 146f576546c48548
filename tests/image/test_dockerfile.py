"""The Dockerfiles: readable, old-engine syntax, made from the lock, and saying what the assembler says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from image_world import make_world

from ops.errors import ConfigError
from ops.image import workflow as build
from ops.image.build import dockerfile
from ops.image.build.container_config import environment, labels
from ops.image.spec.paths import Places

IMAGES = ["practice", "train-cu126", "train-cu130"]
FOLDERS = sorted(path.parent for path in Places().root.glob("docker/*/*/Dockerfile"))
SCRIPTS = sorted([*Places().root.glob("docker/**/*.sh"), *Places().root.glob("docker/box/*/usr/local/bin/*")])


def test_each_image_and_the_base_have_a_dockerfile():
    assert [str(folder.relative_to(Places().root / "docker")) for folder in FOLDERS] == ["os/1", *(f"{name}/1" for name in IMAGES)]


@pytest.mark.parametrize("name", IMAGES)
def test_the_committed_dockerfile_is_the_one_that_the_lock_gives(name):
    found, spec = build.read_lock(name), build.define(name)
    folder = Places().dockerfile(found.dockerfile)
    assert (folder / "Dockerfile").read_text() == dockerfile.render(found, spec)
    assert (folder / "install.sh").read_text() == dockerfile.INSTALL


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_nothing_in_it_is_newer_than_engine_20_10(folder):
    text = (folder / "Dockerfile").read_text()
    assert not re.search(r"^#\s*syntax=|--mount|--link|--network|<<", text.replace("docker build --network=none", ""), re.MULTILINE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_hadolint_has_nothing_to_say(folder):
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists() and not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed")
    done = subprocess.run([str(hadolint if hadolint.exists() else "hadolint"), str(folder / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_its_scripts_are_posix_sh(script):
    for shell in ("dash", "bash"):
        if shutil.which(shell):
            assert subprocess.run([shell, "-n", str(script)], capture_output=True, text=True).stderr == ""


def test_the_environment_and_labels_are_those_of_the_assembled_image():
    found = build.read_lock("train-cu130")
    text = dockerfile.render(found, build.define("train-cu130"))
    said = dict(re.findall(r"^(?:ENV |LABEL |    )([\w.-]+)=(\S+?)(?: \\)?$", text, re.MULTILINE))
    assert {key: value.strip("'") for key, value in said.items()} == environment(found) | labels(found)


def test_every_layer_has_a_line_in_the_order_of_the_image():
    found = build.read_lock("train-cu126")
    copied = re.findall(r"^COPY (?:--from=wheels /layers/)?([\w-]+)/ /", dockerfile.render(found, build.define("train-cu126")), re.MULTILINE)
    final = copied[copied.index("venv") :]
    assert final == [layer.name for layer in found.layers[1:]] + ["site"]


def test_the_context_holds_what_was_fetched_and_nothing_else(tmp_path):
    places = make_world(tmp_path / "world")
    build.context("tiny", tmp_path / "context", places)
    held = {str(path.relative_to(tmp_path / "context")) for path in (tmp_path / "context").rglob("*") if path.is_file()}
    assert held >= {"groups/torch.txt", "groups/python.txt", "site/trainer/launch.py", "wheels/pip-26.0-py3-none-any.whl"}
    assert {path.split("/")[0] for path in held} == {"Dockerfile", "install.sh", "prune.txt", "groups", "wheels", "box", "site"}
    assert "--hash=sha256:" in (tmp_path / "context/groups/python.txt").read_text()


def test_a_checkout_made_with_another_umask_gives_the_same_modes(tmp_path):
    places = make_world(tmp_path / "world")
    box = places.dockerfile(build.define("tiny", places).box)
    commands = [path for path in box.rglob("*") if path.is_file()]
    assert commands
    before = {str(path.relative_to(box)): 0o755 if path.stat().st_mode & 0o100 else 0o644 for path in commands}
    for path in commands:
        path.chmod(path.stat().st_mode | 0o020)
    build.context("tiny", tmp_path / "context", places)
    assert {path: (tmp_path / "context/box" / path).stat().st_mode & 0o777 for path in before} == before


def test_a_context_is_not_laid_over_other_files(tmp_path):
    places = make_world(tmp_path / "world")
    with pytest.raises(ConfigError, match="is not empty"):
        build.context("tiny", tmp_path, places)


def test_a_login_over_ssh_finds_the_trainer_without_the_images_environment():
    text = (Places().root / "docker/box/1/usr/local/bin/milktea-train").read_text()
    assert "/opt/venv/bin/python -m trainer.launch" in text
    script = Places().root / "docker/box/1/etc/milktea/environment.sh"
    told = ["sh", "-euc", f". {script}; echo $PATH; echo $TRITON_CACHE_DIR"]
    done = subprocess.run(told, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["/opt/venv/bin:/usr/bin:/bin", "/tmp/milktea-triton"]
