"""What an image is, and what its lock may and may not say."""

import re
import tomllib

import pytest
from image_world import DEFINITION

from ops.errors import ConfigError
from ops.image import workflow as build
from ops.image.assemble import group
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
    assert {deb.name for deb in found.debs} >= {package for package in spec.os.packages if package != "python3-dev"}
    assert [layer.name for layer in found.layers[:3]] == ["os", "venv", "box"]
    assert {layer.name for layer in found.layers} >= {wheel.layer for wheel in found.wheels}
    assert len(found.layers) + 1 <= 100
    assert sorted({wheel.name for wheel in found.wheels}) == [wheel.name for wheel in found.wheels]


@pytest.mark.parametrize("name", IMAGES)
def test_a_committed_lock_says_nothing_of_the_machine_that_made_it(name):
    text = Places().lock(name).read_text()
    assert not re.search(r"https?://|file:|/home/|/work/|/root/|/tmp/|localhost|127\.0\.0\.1", text)
    assert not re.search(r"20\d\d-\d\d-\d\d[T ]\d\d:", text)


@pytest.mark.parametrize("name", IMAGES)
def test_a_committed_lock_is_written_as_it_would_be_written_again(name):
    assert lock.dumps(build.read_lock(name)) == Places().lock(name).read_text()


def test_the_practice_image_has_torch_and_stays_under_a_gigabyte_without_its_model():
    found = build.read_lock("practice")
    assert any(wheel.name == "torch" for wheel in found.wheels)
    assert sum(layer.size_bytes for layer in found.layers if layer.kind != "model") <= 1_000_000_000


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
    path.write_text(DEFINITION.replace("[layers]", "[layers]\nbig_mib = 3"))
    with pytest.raises(ConfigError, match=r"tiny\.toml: layers\.big_mib: Extra inputs"):
        definition.read(path)


def test_a_base_that_is_not_pinned_by_digest_is_refused(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(re.sub(r'"debian:.*"', '"debian:bookworm-slim"', DEFINITION))
    with pytest.raises(ConfigError, match=r"os\.registry_base"):
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
    one, other = definition.Definition.model_validate(value), definition.Definition.model_validate(turned)
    assert one.sha256 == other.sha256 != one.model_copy(update={"version": 4}).sha256


def test_gpu_libraries_lie_below_torch_and_the_fast_moving_on_top():
    for name in ("train-cu130", "train-cu126"):
        found, spec = build.read_lock(name), build.define(name)
        order = [layer.name for layer in found.layers]
        gpu = [i for i, layer in enumerate(order) if layer.startswith(("nvidia-", "triton"))]
        assert max(gpu) < order.index("torch") < order.index("python") < order.index("transformers") < order.index("peft")
        assert {wheel.layer for wheel in group(found.wheels, spec)} == {wheel.layer for wheel in found.wheels}
