"""Pure: whether a driver and a GPU can run a CUDA line, and the remedy. The numbers are NVIDIA's.

Sources: CUDA Toolkit Release Notes, "CUDA Toolkit and Corresponding Driver Versions" (NATIVE); CUDA
Compatibility guide, minor version compatibility (FLOOR) and binary compatibility of cubin and PTX;
the NVIDIA_REQUIRE_CUDA setting of NVIDIA's own CUDA images (COMPAT: driver branches whose
cuda-compat package NVIDIA supports); end-of-support notes of the driver branches (LAST_BRANCH).
INSTALL.sh uses the verdicts that ops/image/bundle/manifest.py computes from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["native", "minor", "ptx", "compat", "driver-too-old", "gpu-too-old", "gpu-too-new"]
RUNS: frozenset[Kind] = frozenset({"native", "minor", "ptx"})

# The driver of Linux that came with the toolkit's first release.
NATIVE = {
    "11.0": "450.51.05", "11.1": "455.23", "11.2": "460.27.03", "11.3": "465.19.01",
    "11.4": "470.42.01", "11.5": "495.29.05", "11.6": "510.39.01", "11.7": "515.43.04",
    "11.8": "520.61.05", "12.0": "525.60.13", "12.1": "530.30.02", "12.2": "535.54.03",
    "12.3": "545.23.06", "12.4": "550.54.14", "12.5": "555.42.02", "12.6": "560.28.03",
    "12.8": "570.26", "12.9": "575.51.03", "13.0": "580.65.06", "13.1": "590.44.01",
    "13.3": "610.43.02",
}  # fmt: skip
FLOOR = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
COMPAT = {
    "11.7": (450, 470, 510), "11.8": (450, 470, 510), "12.0": (450, 470, 510, 515),
    "12.1": (450, 470, 510, 515, 525), "12.4": (470, 525, 535), "12.6": (470, 535, 550),
    "12.8": (470, 535, 550), "12.9": (470, 535, 550, 570), "13.0": (535, 550, 570),
    "13.1": (535, 550, 570),
}  # fmt: skip

# Compute capabilities of NVIDIA's GPUs from Kepler on.
CAPABILITIES = (
    "3.5", "3.7", "5.0", "5.2", "5.3", "6.0", "6.1", "6.2", "7.0", "7.2", "7.5", "8.0", "8.6",
    "8.7", "8.9", "9.0", "10.0", "10.1", "10.3", "11.0", "12.0", "12.1",
)  # fmt: skip


@dataclass(frozen=True)
class CudaLine:
    """One image line. ``cuda`` is the toolkit's version or None for a CPU image; ``arches`` are the
    compute capabilities with compiled code (``8.0``; ``9.0a`` binds to exactly that GPU), ``ptx``
    those that a driver may compile from for newer GPUs."""

    name: str
    cuda: str | None
    arches: tuple[str, ...] = ()
    ptx: tuple[str, ...] = ()

    @property
    def native(self) -> str:
        """The driver that knows all of this CUDA. Raises KeyError, naming the version, when NATIVE
        lacks it.
        """
        return NATIVE[self.cuda] if self.cuda else "0"

    @property
    def floor(self) -> str:
        """The oldest driver that runs it by minor version compatibility."""
        return FLOOR[self.cuda.split(".")[0]] if self.cuda else "0"

    @property
    def compat(self) -> tuple[int, ...]:
        return COMPAT.get(self.cuda or "", ())


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    remedy: str

    @property
    def runs(self) -> bool:
        return self.kind in RUNS


def judge(
    driver: str, capability: str, data_center: bool, line: CudaLine, lines: Iterable[CudaLine] = ()
) -> Verdict:
    """The verdict on one GPU (``capability`` such as ``8.6``) under ``driver`` (such as
    ``535.104.05``), with the remedy; ``lines`` are the image lines that the remedy may offer
    instead."""
    kind = _kind(driver, capability, data_center, line)
    return Verdict(kind, _remedy(kind, driver, capability, data_center, line, lines))


def turning_points(lines: Iterable[CudaLine]) -> list[str]:
    """The drivers at which a verdict may change, newest first, down to 0; between two of them it
    does not."""
    found = {"0"}
    for line in lines:
        found |= {line.native, line.floor}
        found |= {str(branch + step) for branch in line.compat for step in (0, 1)}
    return sorted(found, key=_version, reverse=True)


def last_branch(capability: str) -> int:
    """The newest driver branch that supports a GPU: 470 for Kepler, 580 for Maxwell, Pascal and
    Volta."""
    if capability.startswith("3."):
        return 470
    return 580 if capability.startswith(("5.", "6.")) or capability in ("7.0", "7.2") else 99999


def is_data_center(gpu_name: str) -> bool:
    """Whether a GPU is a data-centre card, by the name that nvidia-smi prints; False for unknown
    names."""
    if any(word in gpu_name for word in ("GeForce", "TITAN", "Quadro", "RTX")):
        return False
    last = gpu_name.removeprefix("NVIDIA").strip()
    return "Tesla" in gpu_name or (
        (last[:2] in ("GH", "GB") or last[:1] in "AHLBTVP") and any(c.isdigit() for c in last[1:4])
    )


def _kind(driver: str, capability: str, data_center: bool, line: CudaLine) -> Kind:
    if line.cuda is None:
        return "native"
    how = runs_on(capability, line)
    if how in ("gpu-too-old", "gpu-too-new"):
        return how  # type: ignore[return-value]
    if _version(driver) >= _version(line.native):
        return "ptx" if how == "ptx" else "native"
    if how == "cubin" and _version(driver) >= _version(line.floor):
        return "minor"
    if how == "cubin" and data_center and _version(driver)[0] in line.compat:
        return "compat"
    return "driver-too-old"


def runs_on(capability: str, line: CudaLine) -> str:
    """How this line's code runs on a GPU: cubin, ptx, gpu-too-old or gpu-too-new."""
    major, minor = _version(capability)
    plain = [_version(a) for a in line.arches if a[-1].isdigit()]
    exact = [a.rstrip("abcdefghijklmnopqrstuvwxyz") for a in line.arches if not a[-1].isdigit()]
    if capability in exact or any(a[0] == major and a[1] <= minor for a in plain):
        return "cubin"
    if any(_version(p) <= (major, minor) for p in line.ptx):
        return "ptx"
    return "gpu-too-new" if any(a <= (major, minor) for a in plain) else "gpu-too-old"


def _remedy(
    kind: Kind,
    driver: str,
    capability: str,
    data_center: bool,
    line: CudaLine,
    lines: Iterable[CudaLine],
) -> str:
    fits = [x.name for x in lines if x.cuda and _kind(driver, capability, data_center, x) in RUNS]
    carry = f"carry a bundle of the image line {' or '.join(fits)}" if fits else ""
    if kind == "native":
        return "nothing to do"
    if kind == "minor":
        return "nothing to do"
    if kind == "ptx":
        avoid = f"; {carry} to avoid it" if carry else ""
        return f"nothing to do; the first start compiles for this GPU and takes minutes{avoid}"
    if kind == "gpu-too-old":
        return carry or "this GPU needs an older CUDA than any image line here has: use another GPU"
    if kind == "gpu-too-new":
        return carry or "carry an image line with a newer CUDA"
    needs = line.native if runs_on(capability, line) == "ptx" else line.floor
    update = (
        f"update the driver to {needs} or newer"
        if _version(needs)[0] <= last_branch(capability)
        else ""
    )
    if kind == "compat":
        package = f"cuda-compat-{str(line.cuda).replace('.', '-')}"
        start = f"start with MILKTEA_CUDA_COMPAT=the folder of NVIDIA's package {package}"
        update = f"{update}, or {start}" if update else start
    return ", or ".join(x for x in (update, carry) if x)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split("."))
