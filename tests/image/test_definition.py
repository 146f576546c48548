"""What an image is, and what its lock may and may not say."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from image_world import DEFINITION, make_world

from ops.errors import ConfigError, PreflightError
from ops.image import workflow as build
from ops.image.build import context
from ops.image.spec import definition, lock
from ops.image.spec.paths import Places
from trainer.wire.job import WIRE

IMAGES = sorted(path.stem for path in Places().root.glob("images/*.toml"))


def test_the_images_are_these():
    assert IMAGES == ["practice", "train-cu126", "train-cu130"]


@pytest.mark.parametrize("name", IMAGES)
def test_a_committed_lock_is_of_its_definition_and_pins_everything(name):
    found, spec = build.read_lock(name), build.define(name)
    assert found.wire == spec.wire == WIRE
    assert {deb.name for deb in found.debs} >= set(spec.os.packages) and len(spec.os.packages) >= 12
    assert {wheel.layer for wheel in found.wheels} == set(spec.layers)
    assert sorted({wheel.name for wheel in found.wheels}) == [wheel.name for wheel in found.wheels]


@pytest.mark.parametrize("name", IMAGES)
def test_a_budget_limits_layers_that_the_dockerfile_makes(name):
    budget, spec = definition.read_budget(Places().budget(name)), build.define(name)
    text = (Places().dockerfile(spec.dockerfile) / "Dockerfile").read_text()
    assert budget and budget.layers.keys() <= {"debian", *re.findall("milktea-settle (\\w+)", text)}
    assert {"torch", "python", "trainer"} <= budget.layers.keys()
    assert sum(budget.layers.values()) <= budget.image_bytes


@pytest.mark.parametrize("name", IMAGES)
def test_a_committed_lock_says_nothing_of_the_machine_that_made_it(name):
    text = Places().lock(name).read_text()
    assert not re.search(r"https?://|file:|/home/|/work/|/root/|/tmp/|localhost|127\.0\.0\.1", text)
    assert not re.search(r"20\d\d-\d\d-\d\d[T ]\d\d:", text)


@pytest.mark.parametrize("name", IMAGES)
def test_a_committed_lock_is_written_as_it_would_be_written_again(name):
    assert lock.dumps(build.read_lock(name)) == Places().lock(name).read_text()


@pytest.mark.parametrize("name", [name for name in IMAGES if name.startswith("train")])
def test_a_cuda_image_has_its_cuda_from_the_wheels_and_a_compiler_for_triton(name):
    found = build.read_lock(name)
    assert {"torch", "triton", "bitsandbytes"} <= {wheel.name for wheel in found.wheels}
    assert {"gcc", "libc6-dev", "libpython3.11-dev"} <= {deb.name for deb in found.debs}
    assert not any("cuda" in deb.name or "nvidia" in deb.name for deb in found.debs)
    assert found.cuda is not None
    assert found.cuda.line == name.removeprefix("train-")


def test_an_unknown_key_is_refused_with_its_path(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(DEFINITION.replace("[python]", "[python]\nbig_mib = 3"))
    with pytest.raises(ConfigError, match=r"tiny\.toml: python\.big_mib: Extra inputs"):
        definition.read(path)


def test_a_base_that_is_not_pinned_by_digest_is_refused(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(re.sub(r'"debian:.*"', '"debian:bookworm-slim"', DEFINITION))
    with pytest.raises(ConfigError, match=r"os\.base"):
        definition.read(path)


def test_an_image_that_does_not_exist_names_those_that_do():
    with pytest.raises(ConfigError, match="there is no image 'nothing'") as caught:
        build.define("nothing")
    assert "practice" in caught.value.hint


def test_a_broken_lock_names_the_key_and_the_command(tmp_path):
    path = tmp_path / "practice.lock"
    path.write_text(Places().lock("practice").read_text().replace('platform = "linux/amd64"\n', ""))
    with pytest.raises(ConfigError, match=r"practice\.lock: platform: Field required") as caught:
        lock.read(path)
    assert caught.value.hint == "make image-lock IMAGE=practice"


def test_the_meaning_of_a_definition_has_the_digest_not_its_spelling():
    value = tomllib.loads(DEFINITION)
    turned = dict(reversed(value.items()))
    one, other = (
        definition.Definition.model_validate(value),
        definition.Definition.model_validate(turned),
    )
    assert one.sha256 == other.sha256 != one.model_copy(update={"version": 4}).sha256


@pytest.mark.parametrize("name", IMAGES)
def test_the_dockerfile_is_the_definitions_and_installs_every_layer_from_what_changes_least(name):
    spec, found = build.define(name), build.read_lock(name)
    text = (Places().dockerfile(spec.dockerfile) / "Dockerfile").read_text()
    assert f"ARG BASE={spec.os.base}\n" in text
    assert set(re.findall(r"SOURCE_DATE_EPOCH=(\d+)", text)) == {str(spec.epoch)}
    assert f"milktea.wire={spec.wire}" in text and f"milktea.version={spec.version}" in text
    installed = re.findall(rf"source=docker/{spec.dockerfile}/wheels/([a-z]+),", text)
    assert sorted(installed) == sorted(spec.layers), "each layer of [layers] is one RUN"
    settled = re.findall(r"milktea-settle ([a-z-]+)", text)
    assert (
        settled[0] == "box"
        and settled[-1] == "trainer"
        and [x for x in settled if x in spec.layers] == installed
    )
    assert text.count("--require-hashes") == len(spec.layers)
    if spec.cuda:
        assert f"milktea.architectures={','.join(spec.cuda.architectures)}" in text
        assert f"milktea.min-driver={spec.cuda.min_driver}" in text
    for layer in spec.layers:
        pins = (
            Places().dockerfile(spec.dockerfile) / "wheels" / layer / "requirements.txt"
        ).read_text()
        assert set(re.findall(r"sha256:(\w+)", pins)) == {
            wheel.sha256 for wheel in found.wheels if wheel.layer == layer
        }


@pytest.mark.parametrize("name", IMAGES)
def test_a_dockerfile_is_clean_for_hadolint(name):
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed")
    path = Places().dockerfile(build.define(name).dockerfile) / "Dockerfile"
    done = subprocess.run(
        [program, "--failure-threshold", "warning", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def released_and_edited(places):
    """Like the lines of docker/released: the files that are no longer what was released."""
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "released"],
        cwd=places.root / "docker",
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    return re.findall("^(.+): FAILED", done.stdout, re.MULTILINE)


@pytest.mark.skipif(not Places().released.is_file(), reason="nothing was released yet")
def test_released_files_are_as_they_were_released():
    assert released_and_edited(Places()) == []


def test_a_released_version_is_never_written_again(tmp_path):
    places = make_world(tmp_path)
    context.release("tiny/3", places)
    assert released_and_edited(places) == []
    with pytest.raises(ConfigError, match="docker/tiny/3 is released") as caught:
        build.lock("tiny", places)
    assert "docker/tiny/4" in caught.value.hint
    with pytest.raises(ConfigError, match="is released"):
        context.write_requirements(
            build.read_lock("tiny", places), build.define("tiny", places), places
        )
    (places.root / "docker/tiny/3/Dockerfile").write_text("FROM scratch\n")
    assert released_and_edited(places) == ["tiny/3/Dockerfile"]


def test_fetched_files_lie_beside_the_dockerfile_and_nothing_else_does(tmp_path):
    places = make_world(tmp_path)
    found = build.read_lock("tiny", places)
    stale = places.root / "docker/tiny/3/wheels/torch/torch-1.0-py3-none-any.whl"
    stale.write_bytes(b"of an older lock")
    context.lay_out(found, places)
    there = {
        path.parent.name: path.name for path in places.root.glob("docker/tiny/3/wheels/*/*.whl")
    }
    assert there == {
        "torch": "torch-2.0-py3-none-any.whl",
        "peft": "peft-1.0-py3-none-any.whl",
        "python": "small-0.1-py3-none-any.whl",
    }
    shutil.rmtree(places.wheels)
    with pytest.raises(PreflightError, match=r"\.whl was not fetched") as caught:
        context.lay_out(found, places)
    assert caught.value.hint == "milktea image fetch tiny"


def test_a_wheel_that_no_layer_takes_is_refused(tmp_path):
    places = make_world(tmp_path)
    spec = build.define("tiny", places).model_copy(update={"layers": {"torch": ["torch"]}})
    with pytest.raises(ConfigError, match="no layer takes the wheel peft"):
        context.assign_layers(build.read_lock("tiny", places).wheels, spec)


def test_another_debian_package_or_key_makes_the_lock_old_and_a_comment_does_not(tmp_path):
    places = make_world(tmp_path)
    path = places.definition("tiny")
    path.write_text("# a comment\n" + path.read_text())
    assert build.read_lock("tiny", places).image == "tiny"
    (places.root / "docker/tiny/3/debian/packages.txt").write_text("python3\ncurl\n")
    with pytest.raises(ConfigError, match="older than its definition") as caught:
        build.read_lock("tiny", places)
    assert caught.value.hint == "make image-lock IMAGE=tiny"
