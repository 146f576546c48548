"""Boxes that are containers of a real image. They need an engine (DOCKER_HOST) and an image that has an sshd."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from fakevast.renter import Key, client_of, reach, rent
from vastai.api import instances as vast_instances
from vastai.api import keys as vast_keys

import docker
from ops.fakevast import FakeVast
from ops.fakevast.docker_box import LABEL

pytestmark = pytest.mark.docker
IMAGE = os.environ.get("FAKEVAST_DOCKER_IMAGE", "milktea/practice:1")


@pytest.fixture
def fake(make: Callable[..., FakeVast]) -> Iterator[FakeVast]:
    one = make(docker=True)
    yield one
    for number in list(one.cloud.instances):
        one.do(lambda number=number: one.cloud.destroy(number))
    left = docker.from_env().containers.list(all=True, filters={"label": f"{LABEL}={one.state_dir}/boxes"})
    assert left == [], "a container outlived its instance"


def test_a_box_is_a_container_of_the_image_and_dies_with_its_instance(fake: FakeVast, key: Key) -> None:
    client = client_of(fake)
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client, image=IMAGE, onstart_cmd="echo started $CONTAINER_ID; touch /root/up", env={"MINE": "1"})
    way = reach(client, number, key)
    for _ in range(100):
        if way.run("true").returncode == 0:
            break
        time.sleep(0.1)
    assert way.run("test -d /opt/venv && cat /etc/os-release").stdout.startswith("PRETTY_NAME")
    assert way.run("pwd; nvidia-smi --query-gpu=name --format=csv,noheader").stdout == "/root\nNVIDIA GeForce RTX 3090\n"
    assert "CONTAINER_API_KEY" not in way.run("env").stdout, "the container's environment is not the session's"
    data = os.urandom(3_000_000)
    done = subprocess.run([*way.ssh, "root@127.0.0.1", "cat"], input=data, capture_output=True, timeout=30)
    assert done.stdout == data and fake.cloud.instances[number].meter.bytes_in > 3_000_000
    assert f"started {number}" in vast_instances.logs(client, number)
    vast_instances.stop_instance(client, number)
    vast_instances.start_instance(client, number)
    for _ in range(100):
        if reach(client, number, key).run("test -e /root/up").returncode == 0:
            break
        time.sleep(0.1)
    assert reach(client, number, key).run("test -e /root/up").returncode == 0, "its files are kept over a stop"
    vast_instances.destroy_instance(client, number)
    assert reach_refused(way.ssh)


def reach_refused(ssh: list[str]) -> bool:
    return subprocess.run([*ssh, "root@127.0.0.1", "true"], capture_output=True, timeout=20).returncode == 255


def test_an_image_that_does_not_exist_says_manifest_unknown(fake: FakeVast) -> None:
    client = client_of(fake)
    number = rent(client, image="nobody/nothing:9")
    for _ in range(100):
        row = vast_instances.show_instance(client, number)
        if row and "manifest unknown" in (row["status_msg"] or ""):
            break
        time.sleep(0.1)
    assert row and "manifest unknown" in row["status_msg"] and row["actual_status"] == "loading"
