"""What the tests of fakevast rent and log in with: vast.ai's own client, OpenSSH, and a look at
what is left behind."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from vastai.api import instances as vast_instances
from vastai.api import offers as vast_offers
from vastai.api.client import VastClient

from ops.fakevast import FakeVast


@dataclass
class Key:
    path: Path
    public: str


def client_of(fake: FakeVast, key: str | None = None) -> VastClient:
    return VastClient(api_key=key or fake.api_key, server_url=fake.url, retry=1, timeout=60)


def call(
    fake: FakeVast, method: str, path: str, body: Any = None, key: str | None = "account"
) -> requests.Response:
    """A raw request; `path` starts after /api."""
    headers = (
        {}
        if key is None
        else {"Authorization": f"Bearer {fake.api_key if key == 'account' else key}"}
    )
    return requests.request(method, f"{fake.url}/api{path}", json=body, headers=headers, timeout=60)


def rent(
    client: VastClient, *, gpu: str = "RTX 3090", machine_id: int | None = None, **order: Any
) -> int:
    """Rents the cheapest single card of that name through vast.ai's own client; returns the
    instance's id."""
    query: dict[str, Any] = {"num_gpus": {"eq": 1}}
    query |= {"machine_id": {"eq": machine_id}} if machine_id else {"gpu_name": {"eq": gpu}}
    offers = vast_offers.search_offers(client, query, order=[["dph_total", "asc"]], storage=20)
    order = {
        "image": "milktea/train:1",
        "disk": 20,
        "ssh": True,
        "direct": True,
        "cancel_unavail": True,
    } | order
    return int(vast_instances.create_instance(client, offers[0]["id"], **order)["new_contract"])


@dataclass
class Reach:
    """How to log in to a box: options for ssh and for scp or sftp."""

    ssh: list[str]
    scp: list[str]

    def run(self, command: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.ssh, "root@127.0.0.1", command],
            capture_output=True,
            text=True,
            timeout=30,
            **more,
        )


def reach(client: VastClient, number: int, key: Key, *, proxy: bool = False) -> Reach:
    row = vast_instances.show_instance(client, number)
    assert row is not None
    port = str(row["ssh_port"] if proxy else row["ports"]["22/tcp"][0]["HostPort"])
    options = [
        "-q",
        "-i",
        str(key.path),
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=10",
        "-F",
        "none",
    ]
    return Reach(["ssh", "-p", port, *options], ["-P", port, *options])


def processes_of(folder: Path) -> list[int]:
    """Processes that say they belong to a box below this folder."""
    wanted, found = f"FAKEVAST_BOX={folder}".encode(), []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return [number for number in found if number != os.getpid()]
