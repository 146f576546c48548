"""How a start unfolds: which status at which second, with which message, and how a planned fault
bends it. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
from typing import Any

from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.settings import Settings

Agenda = list[tuple[float, str, Any]]
_STALLS = {"disk_full", "wrong_gpu", "tunnel_stuck"}  # the box comes up, with something wrong in it
_MODELLED_START_S = 15.0


def image_bytes(image: str, settings: Settings) -> int:
    """Compressed size of what a host pulls for this image: by the first glob of
    `settings.image_bytes` that matches."""
    for pattern, size in settings.image_bytes.items():
        if fnmatch.fnmatchcase(image, pattern):
            return size
    return settings.default_image_bytes


def boot_seconds(instance: Instance, settings: Settings) -> float:
    """Seconds from create to running; a second start needs no pull."""
    if settings.boot_s is not None:
        return settings.boot_s if not instance.pulled else settings.boot_s * 0.3
    pull = (
        0.0
        if instance.pulled
        else image_bytes(instance.image, settings) * 8 / (instance.offer["inet_down"] * 1e6)
    )
    return _MODELLED_START_S + pull


def failure_message(what: str, instance: Instance, fault: Fault | None) -> str:
    """status_msg as seen on the live service for this kind of failure."""
    if fault is not None and "msg" in fault.args:
        return str(fault.args["msg"])
    repository = instance.image.rsplit(":", 1)[0]
    return {
        "pull_error": f"Error response from daemon: manifest for {instance.image} not found: "
        "manifest unknown: manifest unknown",
        "no_space": "failed to register layer: write /usr/lib/libcuda.so: no space left on device "
        f"({repository})",
        "oci_error": "Error response from daemon: failed to create task for container: failed to "
        "create shim task: OCI runtime create failed: "
        "runc create failed: unable to start container process: error during container init: "
        "unknown",
        "cuda_mismatch": "nvidia-container-cli: requirement error: unsatisfied condition: "
        "cuda>=12.8, please update your driver to a newer "
        "version, or use an earlier cuda container: unknown Error: failed to start "
        f"containers: C.{instance.id}",
        "exited": "Container exited with code 1",
        "offline": "The host machine is offline",
        "unknown": "",
    }[what]


def plan_boot(
    instance: Instance, now: float, settings: Settings, fault: Fault | None, broken: str | None
) -> Agenda:
    """The agenda of this start. `broken` is a machine that fails the same way each time."""
    seconds = boot_seconds(instance, settings)
    what = fault.what if fault else broken
    if what == "slow" and fault:
        seconds = float(fault.args.get("boot_s", seconds * 20))
    instance.box_faults.clear()
    if what in _STALLS and fault:
        instance.box_faults[what] = fault.args
    pull_size = 0 if instance.pulled else image_bytes(instance.image, settings)
    agenda: Agenda = [
        (now + seconds * 0.08, "status", ("created", None)),
        (
            now + seconds * 0.16,
            "status",
            ("loading", f"Pulling from {instance.image.rsplit(':', 1)[0]}"),
        ),
    ]
    for done in (25, 50, 75):
        so_far, bar = pull_size * done / 100, "=" * (done // 2)
        text = (
            f"{layer_id(instance.image, done)}: Downloading [{bar}>] "
            f"{so_far / 1e6:.1f}MB/{pull_size / 1e6:.1f}MB"
        )
        agenda.append((now + seconds * (0.16 + 0.7 * done / 100), "message", text))
    if what == "stuck_loading":
        return agenda
    end = now + seconds
    if what in ("pull_error", "no_space"):
        return [*agenda[:2], (end, "message", failure_message(what, instance, fault))]
    agenda.append((now + seconds * 0.9, "pulled", pull_size))
    if what in ("oci_error", "cuda_mismatch"):
        return [*agenda, (end, "host_failed", failure_message(what, instance, fault))]
    if what in ("exited", "offline", "unknown"):
        return [*agenda, (end, "status", (what, failure_message(what, instance, fault)))]
    return [*agenda, (end, "up", None)]


def layer_id(image: str, part: int) -> str:
    """Twelve hexadecimal digits that look like a layer's id and are the same each time."""
    return hashlib.sha256(f"{image}{part}".encode()).hexdigest()[:12]
