"""The life of an instance through vastai's command line, then through its SDK. Runs in the
validators' environment."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from vastai import VastAI

READS = [
    "search offers",
    "search offers --new",
    "search templates",
    "show instance {number}",
    "show instances",
    "show instances-v1",
    "show api-keys",
    "show ssh-keys",
    "show env-vars",
    "show invoices",
    "show invoices-v1 --charges",
    "show deposit {number}",
    "show user",
    "show ipaddrs",
    "show volumes",
    "logs {number}",
    "ssh-url {number}",
    "scp-url {number}",
]


def cli(*words: str) -> str:
    done = subprocess.run(
        ["vastai", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    print("$ vastai", *words, "->", done.returncode)
    assert (
        done.returncode == 0
        and "Failed with error" not in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    return done.stdout


def command_line(public_key: str) -> None:
    cli("create", "ssh-key", public_key)
    offers = json.loads(
        cli(
            "search",
            "offers",
            "gpu_name=RTX_4090 num_gpus=1 reliability>0.99",
            "-o",
            "dph",
            "--storage",
            "20",
            "--raw",
        )
    )
    assert offers and {row["gpu_name"] for row in offers} == {"RTX 4090"}
    cli("search", "offers", "gpu_name=RTX_4090 num_gpus=1")
    made = json.loads(
        cli(
            "create",
            "instance",
            str(offers[0]["id"]),
            "--image",
            "i",
            "--disk",
            "20",
            "--ssh",
            "--direct",
            "--label",
            "cli",
            "--raw",
        )
    )
    number = str(made["new_contract"])
    while json.loads(cli("show", "instance", number, "--raw"))["actual_status"] != "running":
        time.sleep(0.3)
    cli("show", "instance", number)
    cli("show", "instances")
    url = cli("ssh-url", number).strip()
    host, port = url.removeprefix("ssh://root@").split(":")
    ssh = [
        "ssh",
        "-q",
        "-p",
        port,
        "-i",
        "id",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-F",
        "none",
        f"root@{host}",
    ]
    assert subprocess.run(
        [*ssh, "nvidia-smi -L"], capture_output=True, text=True, check=True
    ).stdout.startswith("GPU 0: NVIDIA GeForce RTX 4090")
    cli("logs", number)
    cli("label", "instance", number, "renamed")
    cli("reboot", "instance", number)
    cli("stop", "instance", number)
    cli("start", "instance", number)
    cli("show", "user")
    cli("show", "invoices-v1", "--charges")
    cli("destroy", "instance", number, "-y")
    assert json.loads(cli("show", "instance", number, "--raw") or "{}").get("instances") is None


def reading() -> None:
    """Every command of a renter that only reads, with one instance there."""
    ask = json.loads(cli("search", "offers", "num_gpus=1", "--raw"))[0]["id"]
    order = ["--image", "i", "--disk", "20", "--ssh", "--direct", "--raw"]
    number = str(json.loads(cli("create", "instance", str(ask), *order))["new_contract"])
    for line in READS:
        cli(*line.format(number=number).split())
    cli("destroy", "instance", number, "-y")


def sdk() -> None:
    vast = VastAI()
    credit = vast.show_user()["credit"]
    offer = vast.search_offers(query="num_gpus=2 gpu_ram>=20", order="dph_total", storage=30)[0]
    made = vast.create_instance(
        id=offer["id"],
        image="i",
        disk=30,
        label="sdk",
        ssh=True,
        direct=True,
        onstart_cmd="echo ready; touch here",
    )
    number = made["new_contract"]
    while vast.show_instance(id=number)["actual_status"] != "running":
        time.sleep(0.3)
    assert [row["label"] for row in vast.show_instances()] == ["sdk"] and vast.show_instance(
        id=number
    )["num_gpus"] == 2
    while "ready" not in vast.logs(instance_id=number):
        time.sleep(0.3)
    assert "here" in vast.execute(id=number, command="ls -l /root")
    vast.attach_ssh(instance_id=number, ssh_key=Path("id.pub").read_text())
    vast.destroy_instance(id=number)
    assert vast.show_instance(id=number) is None and vast.show_instances() == []
    bill = [
        row
        for row in vast.show_invoices_v1(charges=True)["results"]
        if row["metadata"]["label"] == "sdk"
    ]
    assert bill and credit - vast.show_user()["credit"] > 0


if __name__ == "__main__":
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "id"], check=True)
    command_line(Path("id.pub").read_text().strip())
    reading()
    sdk()
    print("vastai: command line and SDK went through a whole life against", os.environ["VAST_URL"])
