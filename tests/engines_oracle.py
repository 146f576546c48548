"""Ask SkyPilot and dstack whether they take a task, by their own models. Runs under a Python that
has them (`pip install skypilot dstack`), which MILKTEA_ENGINES names; nothing of ours is imported.

    python tests/engines_oracle.py skypilot|dstack FILE      prints what they read, as JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml


def skypilot(told: dict[str, Any]) -> dict[str, Any]:
    import sky

    secrets = [(name, "given") for name in told.get("secrets") or {}]
    task = sky.Task.from_yaml_config(told, secrets_overrides=secrets)
    cards = [
        {"accelerators": r.accelerators, "disk": r.disk_size, "spot": r.use_spot}
        for r in task.resources
    ]
    return {"name": task.name, "nodes": task.num_nodes, "run": task.run, "resources": cards}


def dstack(told: dict[str, Any]) -> dict[str, Any]:
    from dstack._internal.core.models.configurations import parse_apply_configuration

    task = parse_apply_configuration(told)
    read: dict[str, Any] = json.loads(task.model_dump_json())
    return read


if __name__ == "__main__":
    kind, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        asked = yaml.safe_load(file)
    print("READ " + json.dumps({"skypilot": skypilot, "dstack": dstack}[kind](asked), default=str))
