"""An image from its lock: the same everywhere, known before it is made, and nothing wrong gets into it."""

import gzip
import io
import json
import shutil
import tarfile

import pytest
from image_world import make_world

from ops.errors import ConfigError, PreflightError
from ops.image import workflow as build
from ops.image.fetch import wheels as packages
from ops.image.spec import budget, lock
from ops.image.spec.paths import Places


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def places(pristine, tmp_path):
    shutil.copytree(pristine.root, tmp_path / "checkout", dirs_exist_ok=True)
    return Places(tmp_path / "checkout")


def files_of(image):
    found = {}
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer.path.read_bytes()))) as tar:
            found |= {info.name: info for info in tar if not info.isdir()}
    return found


def test_the_image_is_the_one_that_was_predicted(places):
    foretold = build.predict("tiny", places)
    image = build.assemble("tiny", places)
    assert (image.config_digest, image.manifest_digest, image.tag) == (foretold.config_digest, foretold.manifest_digest, "milktea/tiny:3")
    assert build.assembled("tiny", places)[0] == image


def test_two_builds_in_two_places_have_one_digest(places, tmp_path):
    first = build.assemble("tiny", places)
    again = make_world(tmp_path / "elsewhere")
    for blob in list(again.blobs.iterdir())[1:]:
        blob.unlink()
    assert build.assemble("tiny", again).manifest_digest == first.manifest_digest
    assert lock.dumps(build.read_lock("tiny", again)) == lock.dumps(build.read_lock("tiny", places))


def test_layers_run_from_what_rarely_changes_to_our_own_code(places):
    image = build.assemble("tiny", places)
    assert [layer.name for layer in image.layers] == ["os", "venv", "box", "torch", "python", "peft", "trainer"]


def test_the_image_holds_the_packages_the_box_and_the_trainer(places):
    files = files_of(build.assemble("tiny", places))
    site = "opt/venv/lib/python3.11/site-packages"
    for path in (f"{site}/torch/lib.so", f"{site}/small.py", f"{site}/trainer/launch.py", f"{site}/ops/job/config.py", "opt/venv/pyvenv.cfg"):
        assert path in files
    assert files["opt/venv/bin/small"].mode == files["usr/local/bin/milktea-train"].mode == 0o755
    assert files["opt/venv/bin/python"].linkname == "/usr/bin/python3.11"


def test_what_the_definition_prunes_is_left_out_and_the_rest_stays(places):
    files = files_of(build.assemble("tiny", places))
    site = "opt/venv/lib/python3.11/site-packages"
    assert f"{site}/torch/test/x.py" not in files
    assert f"{site}/torch/l.a" not in files
    assert f"{site}/trainer/practice/pretrained/model.safetensors" not in files
    assert f"{site}/torch/__init__.py" in files


def test_a_change_of_the_trainer_changes_its_layer_alone_and_needs_no_new_lock(places):
    before = build.assemble("tiny", places)
    (places.root / "trainer" / "launch.py").write_text("print('changed')\n")
    after = build.assemble("tiny", places)
    changed = [x.name for x, y in zip(after.layers, before.layers, strict=True) if x.diff_id != y.diff_id]
    assert changed == ["trainer"]


def test_a_new_version_of_a_package_on_top_leaves_the_layers_below_as_they_were(places, tmp_path):
    before = build.assemble("tiny", places)
    after = build.assemble("tiny", make_world(tmp_path / "next", peft="1.1"))
    changed = [x.name for x, y in zip(after.layers, before.layers, strict=True) if x.blob_sha256 != y.blob_sha256]
    assert changed == ["peft"]


def test_config_says_how_the_container_starts_and_which_wire_it_speaks(places):
    config = json.loads(build.assemble("tiny", places).config_json_bytes)
    runtime = config["config"]
    assert runtime["Entrypoint"] == ["/usr/bin/tini", "--", "/usr/local/bin/milktea-box"]
    assert runtime["Labels"]["milktea.wire"] == "1"
    assert {"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "WANDB_MODE=offline"} <= set(runtime["Env"])
    assert config["created"] == "2025-05-20T00:00:00Z"
    assert str(places.root) not in json.dumps(config)


def test_a_wheel_that_changed_after_its_check_is_refused_and_leaves_no_blob(places):
    found = build.read_lock("tiny", places)
    [torch] = [wheel for wheel in found.wheels if wheel.name == "torch"]
    path = packages.where(torch, places.wheels)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    [locked] = [layer for layer in found.layers if layer.name == "torch"]
    with pytest.raises(PreflightError, match=r"layer torch came out as .* the lock says"):
        build.assemble("tiny", places)
    assert not (places.blobs / locked.blob_sha256).exists()


def test_an_edited_box_is_refused_with_what_to_do(places):
    (places.root / "docker/box/1/usr/local/bin/milktea-train").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(PreflightError, match="docker/box was edited after the lock"):
        build.assemble("tiny", places)


def test_an_edit_of_the_trainer_during_the_build_is_for_the_next_build(places):
    def edit(line):
        (places.root / "trainer" / "launch.py").write_text("print('edited while building')\n")

    foretold = build.predict("tiny", places)
    assert build.assemble("tiny", places, progress=edit).config_digest == foretold.config_digest
    assert build.predict("tiny", places) != foretold


def test_a_wheel_that_was_not_fetched_is_named_with_the_command(places):
    shutil.rmtree(places.wheels)
    places.wheels.mkdir()
    with pytest.raises(PreflightError, match=r"\.whl was not fetched") as caught:
        build.assemble("tiny", places)
    assert "make image IMAGE=tiny" in caught.value.hint


def test_a_lock_older_than_its_definition_is_refused(places):
    path = places.definition("tiny")
    path.write_text(path.read_text().replace('"small"]', '"small", "more"]'))
    with pytest.raises(ConfigError, match="older than its definition") as caught:
        build.assemble("tiny", places)
    assert caught.value.hint == "make image-lock IMAGE=tiny"


def test_a_comment_in_the_definition_does_not_make_the_lock_old(places):
    path = places.definition("tiny")
    path.write_text("# a comment\n" + path.read_text())
    assert build.read_lock("tiny", places).image == "tiny"


def test_an_image_over_its_budget_is_refused_with_the_bytes(places):
    whole = build.assembled("tiny", places)[1] if places.image("tiny").exists() else None
    build.assemble("tiny", places)
    whole = build.assembled("tiny", places)[1]
    torch = next(layer for layer in whole.layers if layer.name == "torch")
    places.budget("tiny").write_text(f"image_bytes = {whole.size_bytes}\n[layers]\ntorch = {torch.size_bytes - 1}\n")
    with pytest.raises(ConfigError, match=f"layer torch has {torch.size_bytes:,} bytes, 1 more than"):
        build.assemble("tiny", places)
    places.budget("tiny").write_text(f"image_bytes = {whole.size_bytes - 5}\n")
    with pytest.raises(ConfigError, match="5 more than its"):
        build.assemble("tiny", places)


def test_every_byte_is_attributed_and_growth_is_explained_to_the_byte(places, tmp_path):
    build.assemble("tiny", places)
    whole = build.assembled("tiny", places)[1]
    assert sum(row[1] for row in budget.attribution(whole)) == whole.size_bytes
    assert all(row[3] for row in budget.attribution(whole))
    (places.root / "trainer" / "more.py").write_text("x" * 600)
    build.assemble("tiny", places)
    grown = build.assembled("tiny", places)[1]
    assert budget.growth(whole, grown) == [("trainer", grown.size_bytes - whole.size_bytes)]


def test_a_full_disk_is_told_before_the_first_byte(places):
    from ops.image.assemble import require_space

    with pytest.raises(PreflightError, match=r"GB free, the layers need 1000000\.0 GB"):
        require_space(10**15, places.cache)


def test_an_image_that_was_never_assembled_says_what_to_type(places):
    with pytest.raises(ConfigError) as caught:
        build.assembled("tiny", places)
    assert caught.value.hint == "make image IMAGE=tiny"
