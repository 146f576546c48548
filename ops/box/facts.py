"""Pure: what a box says of itself, and whether it matches the offer. One script asks for
everything, one parser reads the answer.

The box is asked because the offer is not believed: a client that lost its filters rented the wrong
GPU at four times the price (skypilot#9733), and drivers break on machines that the market calls
reliable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ops.hardware.driver import NATIVE
from ops.market.models import Offer
from ops.market.ranking import Needs

MARK = "=milktea-facts="
NVIDIA_SMI = (
    "nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap,mig.mode.current "
    "--format=csv,noheader,nounits"
)
DISK = "df -Pk ."
# A broken GPU makes nvidia-smi hang for minutes, so it gets 30 s; vast.ai's shells come with a
# short PATH.
SCRIPT = f"""\
export LC_ALL=C PATH="$PATH:/usr/local/bin:/usr/bin:/bin:/usr/local/nvidia/bin"
limit=; command -v timeout >/dev/null 2>&1 && limit="timeout 30"
echo "{MARK} gpu"; $limit {NVIDIA_SMI} 2>&1; code=$?
echo "{MARK} gpu-exit"; echo "$code"
echo "{MARK} disk"; {DISK} 2>&1
echo "{MARK} memory"
while read -r key kib rest; do [ "$key" = MemTotal: ] && echo "$((kib * 1024))"; done </proc/meminfo
cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null
echo "{MARK} shm"; df -Pk /dev/shm 2>/dev/null
true
"""

_LEAST_MEMORY = 0.95  # share of the memory that was offered: vast.ai rounds, and ECC takes a part
_LEAST_HOST = 0.9  # share of the host memory that was asked for
SHM_BYTES = 32 << 20  # bytes of /dev/shm for each GPU beside the first, which NCCL needs
_LEAST_DISK = 0.5  # share of the disk that was rented: the image may count against it


@dataclass(frozen=True)
class GpuFacts:
    """Of the box's GPUs: `name` of the first that differs from the others, else of all;
    `memory_gib` of the smallest."""

    name: str
    count: int
    memory_gib: float
    driver: str
    compute_capability: float
    mig: bool = False


@dataclass(frozen=True)
class DiskFacts:
    """The file system of the login's home."""

    free_bytes: int
    path: str


@dataclass(frozen=True)
class HostFacts:
    """What the container may use of the host; 0 where it does not say. The limits of its control
    group count, since /proc shows the whole machine."""

    memory_gib: float = 0.0
    shm_bytes: int = 0


@dataclass(frozen=True)
class Facts:
    """`complaint` is what nvidia-smi or df said instead of an answer."""

    gpu: GpuFacts | None
    disk: DiskFacts | None
    complaint: str = ""
    host: HostFacts = HostFacts()


@dataclass(frozen=True)
class ExpectedMachine:
    gpu_name: str
    num_gpus: int
    gpu_memory_gib: float
    disk_gib: float
    min_cuda: float = 0.0
    min_cpu_ram_gib: float = 0.0

    @classmethod
    def of(cls, offer: Offer, needs: Needs) -> ExpectedMachine:
        return cls(
            offer.gpu_name,
            offer.num_gpus,
            offer.gpu_memory_gib,
            needs.disk_gib,
            needs.min_cuda,
            needs.min_cpu_ram_gib,
        )


# -- reading ---------------------------------------------------------------------------------------


def parse(stdout: str) -> Facts:
    """The output of SCRIPT. Never raises: what cannot be read is a complaint."""
    parts = {
        p.partition("\n")[0].strip(): p.partition("\n")[2].strip() for p in stdout.split(MARK)[1:]
    }
    gpu, complaint = parse_gpu(parts.get("gpu", ""), parts.get("gpu-exit", ""))
    disk = parse_disk(parts.get("disk", ""))
    if disk is None:
        complaint = complaint or f"df: {parts.get('disk', '')[:200] or 'says nothing'}"
    return Facts(gpu, disk, complaint, parse_host(parts))


def parse_gpu(output: str, exit_code: str = "0") -> tuple[GpuFacts | None, str]:
    """The answer to NVIDIA_SMI, and its complaint or "". One GPU that cannot be read spoils the
    answer."""
    rows = [[c.strip() for c in line.split(",")] for line in output.splitlines() if line.strip()]
    readable = [row for row in rows if len(row) == 5 and _is_number(row[1]) and _is_number(row[3])]
    if not readable or len(readable) < len(rows) or exit_code.strip() not in ("", "0"):
        if exit_code.strip() == "124":
            return None, "nvidia-smi does not answer within 30 s"
        strange = next((", ".join(row) for row in rows if row not in readable), "")
        return None, f"nvidia-smi: {strange[:200] or 'says nothing'}" + (
            f" (exit {exit_code})" if exit_code.strip() else ""
        )
    differing = next((row[0] for row in readable if row[0] != readable[0][0]), readable[0][0])
    memory = min(float(row[1]) for row in readable) / 1024
    capability = min(float(row[3]) for row in readable)
    mig = any(row[4] == "Enabled" for row in readable)
    return GpuFacts(differing, len(readable), memory, readable[0][2], capability, mig), ""


def parse_disk(output: str) -> DiskFacts | None:
    """The last line of DISK's answer, whatever language its header is in; None when there is no
    such line."""
    lines = output.strip().splitlines()
    found = (
        re.search(r"\s(\d{1,18})\s+(\d{1,18})\s+(-?\d{1,18})\s+(?:\d+%|-)\s+(/.*)$", lines[-1])
        if lines
        else None
    )
    return DiskFacts(max(0, int(found[3])) * 1024, found[4]) if found else None


def parse_host(parts: dict[str, str]) -> HostFacts:
    """The parts memory and shm of SCRIPT's answer; 0 for what none of them says."""
    memory = [int(w) for w in parts.get("memory", "").split() if re.fullmatch(r"\d{1,18}", w)]
    shm = parse_disk(parts.get("shm", ""))
    return HostFacts(min(memory, default=0) / 2**30, shm.free_bytes if shm is not None else 0)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,15}(\.\d{1,9})?", text) is not None


# -- judging ---------------------------------------------------------------------------------------


def unsuitable(facts: Facts, expected: ExpectedMachine) -> str | None:
    """Why the box is not what was offered, in one sentence with both numbers; None when it is."""
    gpu, disk, host = facts.gpu, facts.disk, facts.host
    if gpu is None or disk is None:
        return facts.complaint
    if not same_gpu(gpu.name, expected.gpu_name):
        return f"its GPU is {gpu.name}, offered was {expected.gpu_name}"
    if gpu.count != expected.num_gpus:
        return f"it has {gpu.count} GPUs, offered were {expected.num_gpus}"
    if gpu.mig:
        return (
            f"its {gpu.name} is cut into MIG slices: none of them is the whole GPU that is paid for"
        )
    if gpu.memory_gib < expected.gpu_memory_gib * _LEAST_MEMORY:
        return f"its GPU has {gpu.memory_gib:.1f} GiB, offered were {expected.gpu_memory_gib:.1f}"
    if 0 < host.memory_gib < expected.min_cpu_ram_gib * _LEAST_HOST:
        return (
            f"its container may use {host.memory_gib:.1f} GiB of host memory, this job needs "
            f"{expected.min_cpu_ram_gib:.0f}"
        )
    if 0 < host.shm_bytes < SHM_BYTES * (expected.num_gpus - 1):
        return (
            f"its /dev/shm has {host.shm_bytes / 2**20:.0f} MiB, by which {expected.num_gpus} GPUs "
            "cannot speak"
        )
    needed = NATIVE.get(f"{expected.min_cuda:.1f}")
    if needed and _version(gpu.driver) < _version(needed):
        return (
            f"its driver {gpu.driver} is older than {needed}, with which CUDA "
            f"{expected.min_cuda:.1f} came"
        )
    if disk.free_bytes < expected.disk_gib * _LEAST_DISK * 2**30:
        return (
            f"{disk.path} has {disk.free_bytes / 2**30:.1f} GiB free, rented were "
            f"{expected.disk_gib:.0f}"
        )
    return None


def _version(driver: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d{1,9}", driver))


_SAME_WORD = {
    "super": "s",
    "server": "s",
    "workstation": "ws",
    "pcie": "pcie",
    "hbm3": "sxm",
    "hbm2e": "sxm",
}
_SAYS_NOTHING = {
    "nvidia",
    "geforce",
    "tesla",
    "quadro",
    "q",
    "graphics",
    "gpu",
    "generation",
    "blackwell",
    "edition",
    "accelerator",
    "device",
    "ac",  # NVIDIA B300 SXM6 AC is the card it is
}
_FORMS = {"sxm", "pcie", "nvl"}


def same_gpu(driver_name: str, market_name: str) -> bool:
    """Is "NVIDIA GeForce RTX 4080 SUPER" what vast.ai calls "RTX 4080S"? The form factor counts
    only where both tell it."""
    (model, form), (wanted, wanted_form) = _gpu_words(driver_name), _gpu_words(market_name)
    return model == wanted and (not form or not wanted_form or form == wanted_form)


def _gpu_words(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that make the model, and those that name its socket."""
    text = re.sub(r"\b\d+\s*gb\b", " ", name.lower()).replace("max-q", "maxq")
    text = re.sub(r"\b(\d{4})(s|d|ada|ti|super)\b", r"\1 \2", text)  # 4080S, 4090D, 6000Ada
    text = re.sub(r"\b(sxm)\d\b", r"\1", text)
    words = {_SAME_WORD.get(word, word) for word in re.findall(r"[a-z0-9]+", text)} - _SAYS_NOTHING
    if "maxq" in words:
        words -= {"ws"}
    return frozenset(words - _FORMS), frozenset(words & _FORMS)
