"""The programs that every box has: a `nvidia-smi`, a `df` and a `date` that answer for the rented
machine, a `python3`, and what images add.

They are small shell scripts: a box runs them often, and a shell starts fifty times faster than an
interpreter. Each reads `../facts`, shell assignments that the box's folder holds.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from ops.fakevast.cloud.instance import Instance

_TOOLS = Path(__file__).parent / "tools"
_PYTHON = '#!/bin/sh\nexec {python} "$@"\n'
_MILKTEA_TRAIN = (
    "#!/bin/sh\nPYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} exec {python} -m "
    'trainer.launch "$@"\n'
)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


def install_tools(folder: Path) -> None:
    """Writes what every box has; once for an emulator."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("nvidia-smi", "df", "date"):
        _script(folder / name, (_TOOLS / name).read_text("utf-8"))
    # images are asked whether they have one
    _script(folder / "sshd", "#!/bin/sh\necho 'this box is served by fakevast'\n")
    for name in ("python3", "python"):
        _script(folder / name, _PYTHON.format(python=shlex.quote(sys.executable)))


def install_milktea_image(folder: Path) -> None:
    """What the milktea training image adds: the trainer of this very checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[3]
    _script(
        folder / "milktea-train",
        _MILKTEA_TRAIN.format(root=shlex.quote(str(root)), python=shlex.quote(sys.executable)),
    )


def facts(instance: Instance, home: Path) -> str:
    """The shell assignments from which `nvidia-smi` and `df` answer. A `wrong_gpu` fault makes the
    machine lie in the offer."""
    offer: dict[str, Any] = instance.offer | instance.box_faults.get("wrong_gpu", {})
    name = offer["gpu_name"]
    full = {
        "A100 SXM4": "A100-SXM4-80GB",
        "A100 PCIE": "A100-PCIE-40GB",
        "H100 SXM": "H100 80GB HBM3",
        "H100 PCIE": "H100 PCIe",
        "Tesla V100": "Tesla V100-SXM2-32GB",
        "RTX 6000Ada": "RTX 6000 Ada Generation",
        "RTX 4080S": "GeForce RTX 4080 SUPER",
        "RTX 4060 Ti": "GeForce RTX 4060 Ti",
    }.get(name)
    if full is None:
        full = f"GeForce {name}" if name.startswith("RTX ") and name[4].isdigit() else name
    capability = offer["compute_cap"]
    values = {
        "GPU_FULL_NAME": full,
        "GPU_COUNT": offer["num_gpus"],
        "GPU_MEMORY_MIB": int(offer["gpu_ram"]),
        "DRIVER": offer["driver_version"],
        "COMPUTE_CAP": f"{capability // 100}.{capability % 100 // 10}",
        "CUDA": offer["cuda_max_good"],
        "POWER_W": offer.get("gpu_max_power", 300),
        "GPU_UUID": f"{instance.machine_id:08x}-fa4e-4a57",
        "BOX_HOME": home,
        "DISK_BYTES": int(instance.disk_gb * 1e9),
        "DISK_FREE_BYTES": instance.box_faults["disk_full"].get("free_bytes", 0)
        if "disk_full" in instance.box_faults
        else "",
        "CLOCK_SKEW_S": instance.box_faults.get("clock", {}).get("skew_s", 0),
        "HUB_SHARE": instance.box_faults.get("hub", {}).get("share", 1),
    }
    return "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in values.items())
