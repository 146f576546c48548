"""SkyPilot's own functions for vast.ai, unmodified, from its wheel:
`skypilot_functions.py WHEEL_FOLDER`.

Importing the `sky` package pulls in a hundred others that these functions do not use, so the
packages above them are entered by path alone; the modules themselves, and the adaptor that loads
vastai_sdk, are SkyPilot's.
"""

from __future__ import annotations

import logging
import sys
import time
import types
from pathlib import Path


def enter(folder: Path, *names: str) -> None:
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package


folder = Path(sys.argv[1])
enter(folder, "sky", "sky.provision", "sky.provision.vast", "sky.adaptors")
stand_in = types.ModuleType("sky.sky_logging")
stand_in.init_logger = logging.getLogger  # type: ignore[attr-defined]
sys.modules["sky.sky_logging"] = stand_in
sys.modules["sky"].sky_logging = stand_in  # type: ignore[attr-defined]

from sky.provision.vast import utils  # noqa: E402

# vastai drops every filter of the query that these functions build, disk size too (its bug and
# theirs): 20 GB fits any offer


def wait(number: str, status: str) -> None:
    while utils.list_instances()[number]["status"] != status:
        time.sleep(0.3)


number = str(
    utils.launch(
        name="cluster-head",
        instance_type="1x-RTX_4090-32-65536",
        region="Sweden, SE",
        disk_size=20,
        image_name="vastai/base-image:cuda",
        ports=None,
        preemptible=False,
        secure_only=False,
        ssh_public_key="ssh-ed25519 AAAA someone",
    )
)
wait(number, "RUNNING")
row = utils.list_instances()[number]
assert row["name"] == "cluster-head" and utils.get_ssh_ports("cluster") == [row["ssh_port"]]
assert row["local_ipaddrs"].strip()
utils.stop(number)
wait(number, "STOPPED")
utils.start(number)
wait(number, "RUNNING")
utils.remove(number)
assert utils.list_instances() == {}
# with a bid of its own: the minimum bid that it would take has been rounded to 0 by vastai's
# `chunked`
spot = str(
    utils.launch(
        name="spot-head",
        instance_type="1x-RTX_3090-32-65536",
        region="US",
        disk_size=20,
        image_name="i",
        ports=[8080],
        preemptible=True,
        secure_only=True,
        create_instance_kwargs={"bid_price": 0.5},
    )
)
wait(spot, "RUNNING")
utils.remove(spot)
assert utils.list_instances() == {}
print(
    "skypilot: launch, list, ports, stop, start, remove, and a spot launch; its own dropped "
    "filters are its own"
)
