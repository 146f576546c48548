"""The gate: pip in an engine and the assembler make the same files, layer by layer. Needs Docker and the fetched practice image."""

import json
import os

import pytest

from ops.errors import MilkteaError
from ops.image import canonical
from ops.image import workflow as build
from ops.image.build import engine

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]
RUNTIME = ("Entrypoint", "Cmd", "Env", "ExposedPorts", "Healthcheck", "Labels")


@pytest.fixture(scope="module")
def assembled():
    try:
        client = engine.connect()
        image = build.assemble("practice")
        build.load("practice")
    except MilkteaError as error:
        pytest.skip(f"{error} ({error.hint})")
    return client, image


@pytest.mark.parametrize("buildkit", [False, True], ids=["legacy", "buildkit"])
def test_the_dockerfile_gives_the_files_that_the_assembler_gives(assembled, tmp_path, monkeypatch, buildkit):
    client, image = assembled
    monkeypatch.setenv("PATH", f"/usr/bin:{os.environ['PATH']}")  # the distribution's docker command builds without buildx
    tag = build.build_with_dockerfile("practice", buildkit=buildkit)
    try:
        with (tmp_path / "saved.tar").open("wb") as out:
            out.writelines(client.images.get(tag).save())
    finally:
        client.images.remove(tag, force=True)
    config, layers = canonical.saved_layers(tmp_path / "saved.tar", tmp_path / "saved")
    (tmp_path / "saved.tar").unlink()
    ours = json.loads(image.config_json_bytes)["config"]
    assert {key: config["config"].get(key) for key in RUNTIME} == {key: ours.get(key) for key in RUNTIME}
    assert config["rootfs"]["diff_ids"][0] == image.diff_ids[0]  # the base is the same layer, to the bit
    assert [layer.name for layer, path in zip(image.layers, layers, strict=True) if canonical.digest(layer.path) != canonical.digest(path)] == []
