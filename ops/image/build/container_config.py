"""What a container of ours starts with. The assembler writes it as the image's config, the Dockerfile says it in its own words."""

from __future__ import annotations

import datetime
from typing import Any

from ops.image.bundle.archive import canonical_json
from ops.image.spec.lock import Lock, LockedLayer

VENV = "/opt/venv"
ENTRYPOINT = ["/usr/bin/tini", "--", "/usr/local/bin/milktea-box"]
HEALTH = "/usr/local/bin/milktea-health"
SECOND = 1_000_000_000  # Docker counts nanoseconds

OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
}
PLACES = {
    "MPLCONFIGDIR": "/tmp/milktea-matplotlib",
    "PYTHONPYCACHEPREFIX": "/tmp/milktea-pycache",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/milktea-inductor",
    "TRITON_CACHE_DIR": "/tmp/milktea-triton",
}
NVIDIA = {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility", "NVIDIA_VISIBLE_DEVICES": "all"}


def environment(lock: Lock) -> dict[str, str]:
    """The image's ENV. A login over SSH does not see it (so a rented box may reach the hub); `docker run` does."""
    path = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    values = {"LANG": "C.UTF-8", **OFFLINE, **PLACES, **(NVIDIA if lock.cuda else {})}
    return {"PATH": path, **dict(sorted(values.items()))}


def labels(lock: Lock) -> dict[str, str]:
    found = {"milktea.wire": str(lock.wire), "milktea.image": lock.image, "milktea.version": str(lock.version)}
    if lock.cuda:
        found |= {"milktea.cuda": lock.cuda.toolkit, "milktea.min-driver": lock.cuda.min_driver}
        found["milktea.architectures"] = ",".join(lock.cuda.architectures)
    if bundled := [model for model in lock.models if model.bundled]:
        found["milktea.models"] = ",".join(f"{model.name}={model.set_digest}" for model in bundled)
    return dict(sorted(found.items()))


def config_json(lock: Lock, layers: list[LockedLayer]) -> bytes:
    """The image config, of the lock and the DiffIDs alone: its digest is known before a byte of the image is written."""
    created = datetime.datetime.fromtimestamp(lock.epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    system, _, architecture = lock.platform.partition("/")
    runtime: dict[str, Any] = {
        "Cmd": None,
        "Entrypoint": ENTRYPOINT,
        "Env": [f"{key}={value}" for key, value in environment(lock).items()],
        "ExposedPorts": {"22/tcp": {}},
        "Healthcheck": {"Test": ["CMD", HEALTH], "Interval": 60 * SECOND, "Timeout": 10 * SECOND, "Retries": 3},
        "Labels": labels(lock),
    }
    return canonical_json({
        "architecture": architecture,
        "config": runtime,
        "created": created,
        "history": [{"created": created, "created_by": f"milktea layer {layer.name}"} for layer in layers],
        "os": system,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    })  # fmt: skip
