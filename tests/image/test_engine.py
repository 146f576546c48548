"""Images in a real engine: loaded layer by layer, checked by DiffIDs, pushed. Needs Docker."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from image_world import make_world

from ops.errors import MilkteaError, PreflightError
from ops.image import workflow as build
from ops.image.build import engine

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(scope="module")
def client():
    try:
        return engine.connect()
    except MilkteaError as error:
        pytest.skip(str(error))


@pytest.fixture
def places(tmp_path, client):
    places = make_world(tmp_path / "world")
    build.assemble("tiny", places)
    yield places
    for tag in ("milktea/tiny:3", "milktea/os-tiny:3"):
        engine._remove(client, tag)


def parts(client):
    return [tag for image in client.images.list() for tag in image.tags if tag.startswith(engine.PART)]


def test_a_loaded_image_has_the_predicted_id_and_leaves_no_part_behind(places, client):
    foretold = build.predict("tiny", places)
    assert build.load("tiny", places) in (foretold.config_digest, foretold.manifest_digest)
    assert engine.layers_of(client, "milktea/tiny:3") == build.assembled("tiny", places)[0].diff_ids
    assert parts(client) == []


def test_loading_twice_is_loading_once(places):
    said = []
    assert build.load("tiny", places) == build.load("tiny", places, progress=said.append)
    assert said == []


def test_a_load_that_broke_off_goes_on_at_the_missing_layer(places, client):
    image, _ = build.assembled("tiny", places)
    blob = image.layers[4].path
    kept = blob.read_bytes()
    blob.unlink()
    with pytest.raises(PreflightError, match=r"layer python .* is not whole on this disk"):
        build.load("tiny", places)
    blob.write_bytes(kept)
    said = []
    build.load("tiny", places, progress=said.append)
    assert [line.split(":")[0] for line in said] == ["loading 5 of 7", "loading 6 of 7", "loading 7 of 7"]
    assert parts(client) == []


def test_a_flipped_bit_is_refused_whatever_the_engine_says(places, client):
    image, _ = build.assembled("tiny", places)
    blob = image.layers[3].path
    damaged = bytearray(blob.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(PreflightError, match="the engine did not take layer torch"):
        build.load("tiny", places)
    assert engine.layers_of(client, "milktea/tiny:3") is None


def test_the_base_alone_is_an_image_for_the_dockerfile_to_stand_on(places, client):
    tag = build.load_base("tiny", places)
    assert engine.layers_of(client, tag) == build.assembled("tiny", places)[0].diff_ids[:1]


def test_an_engine_that_does_not_answer_says_what_to_do(tmp_path):
    with pytest.raises(PreflightError, match="no Docker engine answers") as caught:
        engine.connect(f"unix://{tmp_path}/nothing.sock")
    assert "DOCKER_HOST" in caught.value.hint


@pytest.fixture
def registry(tmp_path):
    """Debian's docker-registry on loopback."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("docker-registry is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Path(tmp_path / "registry.yml")
    config.write_text(f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
    process = subprocess.Popen([program, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
        assert process.poll() is None
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_a_pushed_image_is_in_the_registry_with_its_layers(places, client, registry):
    digest = build.push("tiny", f"{registry}/me/tiny:3", places)
    client.images.remove("milktea/tiny:3", force=True)
    engine._remove(client, f"{registry}/me/tiny:3")
    pulled = client.images.pull(f"{registry}/me/tiny@{digest}")
    assert list(pulled.attrs["RootFS"]["Layers"]) == build.assembled("tiny", places)[0].diff_ids
    client.images.remove(pulled.id, force=True)


def test_a_push_without_a_tag_says_how_to_write_it(client):
    with pytest.raises(PreflightError, match="names no tag"):
        engine.push(client, "milktea/tiny:3", "ghcr.io/me", lambda line: None)
