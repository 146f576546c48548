"""The practice image as a container: a command, an SSH box, a stranger's user id, a read-only root.
Needs Docker and the image.
"""

import os
import subprocess
import time

import pytest
from machine import needs

from ops.errors import MilkteaError
from ops.image import workflow as build
from ops.image.build import engine
from trainer.wire.job import WIRE

BASE = os.environ.get("MILKTEA_BASE", "base:bookworm") or None
pytestmark = [pytest.mark.docker, pytest.mark.slow]
TAG = build.define("practice").tag


@pytest.fixture(scope="module")
def client():
    try:
        found = engine.connect()
        build.fetch("practice")
        build.build("practice", base=BASE)
    except MilkteaError as error:
        pytest.skip(f"{error} ({error.hint})")
    return found


def run(client, *command, **options):
    return client.containers.run(
        TAG, list(command), remove=True, network_mode="none", stderr=True, **options
    ).decode()


def test_it_speaks_the_wire_that_its_label_says(client):
    assert (
        run(client, "milktea-train", "--wire").strip()
        == str(WIRE)
        == client.images.get(TAG).labels["milktea.wire"]
    )


def test_any_user_may_import_the_stack_on_a_read_only_root(client):
    told = (
        "import torch, transformers, peft, accelerate, bitsandbytes, trainer.launch;"
        " print(torch.ones(2).sum().item())"
    )
    assert (
        run(client, "python", "-c", told, read_only=True, tmpfs={"/tmp": ""}, user="12345:12345")
        .strip()
        .endswith("2.0")
    )


def test_without_a_command_a_stranger_is_told_what_to_type(client):
    container = client.containers.create(TAG, user="12345:12345", network_mode="none")
    try:
        container.start()
        assert container.wait()["StatusCode"] == 64
        assert b"milktea-train job.json" in container.logs()
    finally:
        container.remove(force=True)


def test_the_image_holds_no_key_and_no_trace_of_the_machine_that_made_it(client):
    told = (
        "ls /etc/ssh; cat /etc/machine-id /etc/resolv.conf 2>/dev/null; cat /etc/apt/sources.list;"
        " find /opt -name '*.pyc' | head -1"
    )
    said = run(client, "sh", "-c", told)
    assert "ssh_host" not in said
    assert ".pyc" not in said
    assert {line.split()[1] for line in said.splitlines() if line.startswith("deb ")} == {
        "https://deb.debian.org/debian",
        "https://deb.debian.org/debian-security",
    }


def test_as_a_box_it_lets_the_key_in_and_offers_what_the_box_side_needs(client, tmp_path):
    needs("ssh", "ssh-keygen")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True
    )
    key = (tmp_path / "key.pub").read_text()
    container = client.containers.run(
        TAG,
        detach=True,
        ports={"22/tcp": ("127.0.0.1", None)},
        environment={"MILKTEA_AUTHORIZED_KEYS": key},
    )
    try:
        container.reload()
        port = container.ports["22/tcp"][0]["HostPort"]
        command = [
            "ssh",
            "-i",
            str(tmp_path / "key"),
            "-p",
            port,
            "-o",
            "StrictHostKeyChecking=accept-new",
            "-o",
            "BatchMode=yes",
        ]
        command += [
            "-o",
            f"UserKnownHostsFile={tmp_path}/known",
            "-o",
            "LogLevel=ERROR",
            "root@127.0.0.1",
        ]
        deadline = time.monotonic() + 60
        while (
            subprocess.run([*command, "true"], capture_output=True).returncode == 255
            and time.monotonic() < deadline
        ):
            assert container.status != "exited"
        told = (
            "milktea-train --wire; command -v rsync zstd tini curl python3 sha256sum setsid; id -u;"
            " echo ${HF_HUB_OFFLINE:-online}"
        )
        said = subprocess.run([*command, told], capture_output=True, text=True).stdout.split()
        assert (said[0], said[-2], said[-1]) == (str(WIRE), "0", "online")
        assert len(said) == 10
        assert container.exec_run("milktea-health").exit_code == 0
    finally:
        container.remove(force=True)
