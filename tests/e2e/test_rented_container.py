"""A box that is a container of the practice image, started as vast.ai starts one.

Our client rents it, pushes, trains, pulls and destroys it. The market, the API and the bill are
the emulator's; the machine is the engine's. Only `nvidia-smi` is the emulator's, because the
container has no GPU.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from machine import free_port

import docker
import rig
from ops.fakevast import FakeVast
from ops.fakevast.boxes.environment import container_environment
from ops.fakevast.boxes.tools import facts, install_tools
from ops.fakevast.cloud.instance import Instance
from ops.job import config, planner
from ops.run.journal import Journal
from ops.run.rent_and_train import rent_and_train
from ops.wait import RealClock

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]
PACE = 0.2  # spaced reads and tries to connect; a container's sshd is up within seconds

# What vast.ai runs in place of the image's entry point: keys, the renter's onstart, sshd
START = """
mkdir -p /root/.ssh /run/sshd && chmod 700 /root/.ssh
printf '%s\\n' "$SSH_PUBLIC_KEY" >/root/.ssh/authorized_keys && chmod 600 /root/.ssh/authorized_keys
ssh-keygen -A
(cd /root && bash /vast/onstart.sh) &
exec /usr/sbin/sshd -D -e -p "$SSHD_PORT" -o ListenAddress=127.0.0.1
"""


@pytest.fixture
def engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers here: {error}")
    yield client
    client.close()


class Machine:
    """The host of a cloud's instances: each is a container with a port of its own on loopback.

    It shares this machine's network, because its watchdog has to reach the emulator's API.
    """

    def __init__(self, engine: docker.DockerClient, cloud: FakeVast, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.containers: list[docker.models.containers.Container] = []
        self.logs: list[str] = []
        cloud.cloud.on_start[:] = [self.start]
        cloud.cloud.on_stop.clear()
        cloud.cloud.on_destroy.append(self.destroy)
        install_tools(folder / "tools")

    def start(self, instance: Instance) -> None:
        (self.folder / "facts").write_text(facts(instance, Path("/root")))
        (self.folder / "onstart.sh").write_text(instance.onstart or "")
        mounts = {
            "facts": "/usr/local/facts",
            "tools/nvidia-smi": "/usr/local/bin/nvidia-smi",
            "onstart.sh": "/vast/onstart.sh",
        }
        instance.ssh_port = free_port()
        port = str(instance.ssh_port)
        instance.ports["22/tcp"] = [{"HostIp": "0.0.0.0", "HostPort": port}]
        container = self.engine.containers.run(
            instance.image,
            detach=True,
            entrypoint=["sh", "-c", START],
            environment=container_environment(instance, {}) | {"SSHD_PORT": port},
            network_mode="host",
            volumes=[f"{self.folder / name}:{path}:ro" for name, path in mounts.items()],
        )
        self.containers.append(container)

    def destroy(self, instance: Instance) -> None:
        for container in self.containers:
            self.logs.append(container.logs().decode(errors="replace"))
            container.remove(force=True, v=True)
        self.containers.clear()


def test_our_client_rents_a_container_of_the_practice_image_and_trains_in_it(
    engine: docker.DockerClient, tmp_path: Path
) -> None:
    job = config.load(ROOT / "jobs/practice.toml")
    if not engine.images.list(job.image.ref):
        pytest.skip(f"{job.image.ref} is not loaded: `milktea image build practice` makes it")
    plan = planner.new_plan(job, tmp_path / "runs", RealClock().now(), on_cpu=True)
    plan = replace(plan, out=str(tmp_path / "out"))
    with FakeVast(tmp_path / "fakevast") as fake:
        machine = Machine(engine, fake, tmp_path)
        try:
            with Journal(tmp_path / "runs" / plan.run_id) as journal:
                session = rig.client(plan, journal, fake.url, fake.api_key, pace=PACE)
                outcome = rent_and_train(session)
                kinds = [line.kind for line in journal.lines]
            assert kinds.count("renting") == 1 and kinds[-2:] == ["destroyed", "bill"]
            assert fake.instances() == [] and machine.containers == []
        finally:
            for container in machine.containers:
                container.remove(force=True, v=True)
    assert zipfile.ZipFile(outcome.adapter_zip).testzip() is None
    assert "Accepted publickey for root" in machine.logs[0]
