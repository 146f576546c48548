"""The programs that every box has: a `nvidia-smi` and a `df` that answer for the rented machine, a
`python3`, and what images add.

They are small shell scripts: a box runs them often, and a shell starts fifty times faster than an
interpreter. Each reads `../facts`, shell assignments that the box's folder holds.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from ops.fakevast.cloud.instance import Instance

_NVIDIA_SMI = r"""#!/bin/sh
# nvidia-smi for a machine that is not there.
. "${0%/*}/../facts"
query= format=
for word; do case $word in
  --query-gpu=*) query=${word#*=} ;;
  --query-compute-apps=*|--query-accounted-apps=*) exit 0 ;;
  --format=*) format=${word#*=} ;;
  -L|--list-gpus)
    i=0; while [ $i -lt "$GPU_COUNT" ]; do
      echo "GPU $i: NVIDIA $GPU_FULL_NAME (UUID: GPU-$GPU_UUID-$i)"; i=$((i+1)); done; exit 0 ;;
esac; done
value() { case $1 in
  name|gpu_name) echo "NVIDIA $GPU_FULL_NAME" ;;
  count) echo "$GPU_COUNT" ;;
  index) echo "$2" ;;
  uuid|gpu_uuid) echo "GPU-$GPU_UUID-$2" ;;
  driver_version) echo "$DRIVER" ;;
  compute_cap) echo "$COMPUTE_CAP" ;;
  memory.total) echo "$GPU_MEMORY_MIB MiB" ;;
  memory.used) echo "1 MiB" ;;
  memory.free) echo "$((GPU_MEMORY_MIB - 1)) MiB" ;;
  utilization.gpu|utilization.memory) echo "0 %" ;;
  temperature.gpu) echo 41 ;;
  power.draw) echo "31.00 W" ;;
  power.limit|power.max_limit) echo "$POWER_W.00 W" ;;
  pci.bus_id|gpu_bus_id) printf '00000000:%02X:00.0\n' $(($2 + 1)) ;;
  persistence_mode) echo Enabled ;;
  compute_mode) echo Default ;;
  ecc.mode.current|mig.mode.current) echo "[N/A]" ;;
  pstate) echo P8 ;;
  *) return 1 ;;
esac; }
if [ -n "$query" ]; then
  fields=$(echo "$query" | tr ', ' '  ')
  case $format in *noheader*) ;; *) echo "$query" | sed 's/,/, /g' ;; esac
  i=0; while [ $i -lt "$GPU_COUNT" ]; do
    line=
    for field in $fields; do
      if ! one=$(value "$field" $i); then echo "Field \"$field\" is not a valid field to query." ; exit 2; fi
      case $format in *nounits*) case $field in memory.*|utilization.*|power.*) one=${one% *} ;; esac ;; esac
      line="$line${line:+, }$one"
    done
    echo "$line"; i=$((i+1))
  done
  exit 0
fi
bar=+-----------------------------------------------------------------------------------------+
echo $bar
printf '| NVIDIA-SMI %-22s Driver Version: %-14s CUDA Version: %-8s |\n' "$DRIVER" "$DRIVER" "$CUDA"
echo $bar
i=0; while [ $i -lt "$GPU_COUNT" ]; do
  printf '|   %d  NVIDIA %-30s  On  | %28s  Off |\n' $i "$GPU_FULL_NAME" "$(value pci.bus_id $i)"
  printf '| 30%%   41C    P8    31W / %4sW | %8sMiB / %8sMiB |      0%%      Default |\n' "$POWER_W" 1 "$GPU_MEMORY_MIB"
  i=$((i+1)); done
echo $bar
"""

_DF = r"""#!/bin/sh
# df for a box: its own folder is a disk of the size that was rented. Options of another kind go to the real one.
. "${0%/*}/../facts"
unit=1024 head=1K-blocks cols= suffix=
for word; do case $word in
  -BG|--block-size=G|--block-size=1G) unit=1073741824 head=1G-blocks suffix=G ;;
  -BM|--block-size=M|--block-size=1M) unit=1048576 head=1M-blocks suffix=M ;;
  -B1|--block-size=1) unit=1 head=1B-blocks ;;
  -h|--human-readable|-H) unit=1073741824 head=Size suffix=G ;;
  -k|-Pk|-kP) head=1024-blocks ;;
  -P|--) ;;
  --output=*) cols=${word#*=} ;;
  -*) PATH=/usr/bin:/bin exec df "$@" ;;
esac; done
case " $* " in *" -P"*) [ "$head" = 1K-blocks ] && head=1024-blocks ;; esac
used=$(($(du -sk "$BOX_HOME" 2>/dev/null | cut -f1) * 1024))
total=$DISK_BYTES free=$((DISK_BYTES - used))
[ -n "$DISK_FREE_BYTES" ] && free=$DISK_FREE_BYTES used=$((DISK_BYTES - DISK_FREE_BYTES))
[ $free -lt 0 ] && free=0
up() { echo $((($1 + unit - 1) / unit))$suffix; }
down() { echo $(($1 / unit))$suffix; }
percent=$(((used * 100 + total - 1) / total))%
if [ -n "$cols" ]; then
  header= line=
  for col in $(echo "$cols" | tr , ' '); do case $col in
    avail) header="$header Avail" line="$line $(down $free)" ;;
    size) header="$header $head" line="$line $(up $total)" ;;
    used) header="$header Used" line="$line $(up $used)" ;;
    pcent) header="$header Use%" line="$line $percent" ;;
    target) header="$header Mounted" line="$line /" ;;
    source) header="$header Filesystem" line="$line overlay" ;;
  esac; done
  echo "${header# }"; echo "${line# }"; exit 0
fi
name=Available; [ "$suffix" = G ] && name=Avail
use=Use%; case $head in 1024-blocks) use=Capacity ;; esac
printf '%-14s %12s %12s %12s %8s %s\n' Filesystem $head Used $name $use 'Mounted on'
printf '%-14s %12s %12s %12s %8s %s\n' overlay "$(up $total)" "$(up $used)" "$(down $free)" $percent /
"""

_PYTHON = '#!/bin/sh\nexec {python} "$@"\n'
_MILKTEA_TRAIN = (
    "#!/bin/sh\nPYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} exec {python} -m "
    'trainer.launch "$@"\n'
)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def install_tools(folder: Path) -> None:
    """Writes what every box has; once for an emulator."""
    folder.mkdir(parents=True, exist_ok=True)
    _script(folder / "nvidia-smi", _NVIDIA_SMI)
    _script(folder / "df", _DF)
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
    }
    return "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in values.items())
