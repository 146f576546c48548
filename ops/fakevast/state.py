"""What outlives an emulator: the account's key, keys and spending, and the bills. Instances do not;
their boxes end with it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from ops.fakevast.cloud.cloud import Cloud

_FILE = "account.json"


def account_key(state_dir: Path) -> str:
    """The account's API key, the same at each start in this folder."""
    path = state_dir / _FILE
    try:
        return str(json.loads(path.read_text())["api_key"])
    except (OSError, ValueError, KeyError):
        key = secrets.token_hex(32)
        path.write_text(json.dumps({"api_key": key}))
        return key


def save(cloud: Cloud, state_dir: Path) -> None:
    """Write the state to a file of its own and rename it, so that it is never half there."""
    data = {
        "api_key": cloud.account.key,
        "spent_usd": cloud.spent_usd(),
        "charges": cloud.charges(),
        "ssh_keys": cloud.account.ssh_keys,
        "next_instance": cloud.next_instance,
        "next_ask": cloud.next_ask,
    }
    part = state_dir / f".{_FILE}"
    part.write_text(json.dumps(data))
    part.replace(state_dir / _FILE)


def restore(cloud: Cloud, state_dir: Path) -> None:
    """Go on where the last emulator of this folder ended. Numbers are never used twice, so that no
    id means two instances."""
    try:
        data = json.loads((state_dir / _FILE).read_text())
    except (OSError, ValueError):
        return
    cloud.account.spent_before_usd = data.get("spent_usd", 0.0)
    cloud.account.old_charges = data.get("charges", [])
    cloud.account.ssh_keys = data.get("ssh_keys", [])
    cloud.account.last_key_id = max((key["id"] for key in cloud.account.ssh_keys), default=0)
    cloud.next_instance = data.get("next_instance", cloud.next_instance)
