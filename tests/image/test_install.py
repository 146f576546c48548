"""INSTALL.sh where it needs no engine: preflight, verify, trust. Real shells, real files, nothing
stood in for but the machine's own reports (nvidia-smi, docker info), which are recorded."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from image_shell import CU126, CU130, checks, docker_says, flip, jail, pinned, read_checks, script
from machine import needs

from ops.hardware.driver import CudaLine
from ops.image.bundle import parts
from ops.image.bundle.contents import Options

SHELLS = ["dash", "busybox ash", "bash"]


@pytest.fixture
def packed(tiny: Any, tmp_path: Path, release_key: Path) -> Path:
    tiny.add_model().pack(tmp_path / "bundle", Options(volume_bytes=250_000, key=release_key))
    return tmp_path / "bundle"


def a_volume(packed: Path, part: str = "cublas") -> Path:
    return sorted(p for p in (packed / "parts").iterdir() if part in p.name)[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_whole_bundle_is_said_to_be_whole_in_every_shell(
    packed: Path, install: Callable, shell: str
) -> None:
    needs(shell.split()[0])
    ran = install(packed, "verify", shell=shell)
    assert (ran.code, ran.err) == (0, "")
    assert "whole: 16 volumes, signature of SHA256:" in ran.out


def test_a_volume_may_lie_on_another_disk(packed: Path, install: Callable, tmp_path: Path) -> None:
    (tmp_path / "disk2" / "parts").mkdir(parents=True)
    volume = a_volume(packed)
    volume.rename(tmp_path / "disk2" / "parts" / volume.name)
    assert install(packed, "verify").code == 4
    assert install(packed, "verify", "--also", str(tmp_path / "disk2")).code == 0


def test_a_damaged_volume_here_is_taken_whole_from_the_other_disk(
    packed: Path, install: Callable, tmp_path: Path
) -> None:
    volume = a_volume(packed)
    (tmp_path / "disk2" / "parts").mkdir(parents=True)
    shutil.copy(volume, tmp_path / "disk2" / "parts")
    flip(volume, 5)
    assert install(packed, "verify", "--also", str(tmp_path / "disk2")).code == 0


def test_parts_of_two_bundles_mixed_are_found_out(
    tiny: Any, packed: Path, install: Callable, tmp_path: Path
) -> None:
    tiny.contents["trainer"] = {"app/train.py": b"print('two')\n"}
    tiny.pack(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "PLAN", packed / "PLAN")
    ran = install(packed, "verify")
    assert ran.code == 4 and "PLAN is damaged, or belongs to another bundle" in ran.err


def corrupt(folder: Path, dice: random.Random) -> tuple[str, set[str]]:
    """Damage a bundle in one way; returns how, and the files of which one must be named."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    kind = dice.choice(["flip", "truncate", "swap", "delete"])
    file = dice.choice(files)
    name = str(file.relative_to(folder))
    if kind == "flip":
        flip(file, dice.randrange(file.stat().st_size), dice.randrange(8))
    elif kind == "truncate":
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "delete":
        file.unlink()
    else:
        other = dice.choice([f for f in files if f != file and f.read_bytes() != file.read_bytes()])
        file.rename(folder / "swap")
        other.rename(file)
        (folder / "swap").rename(other)
        return f"swap {name} {other.relative_to(folder)}", {name, str(other.relative_to(folder))}
    return f"{kind} {name}", {name}


def one_corruption(packed: Path, scratch: Path, seed: int) -> str:
    """Empty when the damage was refused and named together with a remedy; else what went wrong."""
    folder = scratch / str(seed)
    shutil.copytree(packed, folder, copy_function=os.link)
    how, names = corrupt(folder, random.Random(seed))
    done = subprocess.run(
        ["sh", str(folder / "INSTALL.sh"), "verify", "--prefix", str(scratch / "p")],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=170,
        # a README that took the script's place is run as one, and it says how to write a file
        cwd=scratch,
    )
    shutil.rmtree(folder)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return f"{how}: accepted: {said}"
    if names & {"INSTALL.sh"}:
        return ""  # a damaged script stops in its own way; what counts is that it does not say yes
    if names <= {"SHA256SUMS", "SHA256SUMS.sig", "SHA256SUMS.openssl"}:
        named = (
            any(word in said for word in ("signature", "SHA256SUMS", *names)) or "damaged" in said
        )
    else:
        named = any(name in said for name in names) or "wrong signature" in said
    remedy = any(word in said for word in ("do this: copy", "do this: do not install it"))
    return "" if named and remedy else f"{how}: not named: {said}"


def corruptions(packed: Path, scratch: Path, seeds: range, key: Path) -> list[str]:
    """On a server that knows the sender, so that both signatures are looked at."""
    pinned(scratch / "p", key, pem=True)
    with ThreadPoolExecutor(2) as pool:
        return [bad for bad in pool.map(lambda s: one_corruption(packed, scratch, s), seeds) if bad]


def test_twenty_corruptions_are_all_caught_named_and_given_a_remedy(
    packed: Path, tmp_path: Path, release_key: Path
) -> None:
    assert corruptions(packed, tmp_path / "trials", range(20), release_key) == []


# -- preflight


def preflight(
    tiny: Any,
    install: Callable,
    tmp_path: Path,
    gpus: str = "",
    line: CudaLine = CU130,
    **engine: str,
) -> Any:
    """The preflight of a CUDA bundle on a machine with these GPUs (nvidia-smi's CSV)."""
    if not (tmp_path / "b").exists():
        tiny.pack(tmp_path / "b", line=line, lines=(CU130, CU126))
    docker_says(tmp_path / "bin", **engine)
    if gpus:
        script(tmp_path / "bin", "nvidia-smi", f"echo '{gpus}'\n")
    if not (tmp_path / "jail").exists():
        jail(tmp_path / "jail")
    path = f"{tmp_path / 'bin'}:{tmp_path / 'jail'}"
    return install(tmp_path / "b", "preflight", "--facts", path=path)


def test_a_ready_server_passes_every_check_and_each_says_measured_needed_and_remedy(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    ran = preflight(tiny, install, tmp_path, "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559 MiB")
    assert ran.code == 0, ran.err
    found = checks(ran)
    assert {
        "platform",
        "engine",
        "store",
        "toolkit",
        "bundle",
        "disk of the engine",
        "folder",
        "memory",
        "gpu 0",
    } <= set(found)
    assert all(
        c["verdict"] in ("ok", "warn") and c["measured"] and c["needed"] and c["remedy"]
        for c in found.values()
    )


def test_a_driver_that_is_too_old_is_refused_with_the_image_line_that_fits(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    ran = preflight(tiny, install, tmp_path, "NVIDIA GeForce RTX 3090, 535.104.05, 8.6, 24576 MiB")
    assert ran.code == 3
    found = checks(ran)["gpu 0"]
    assert found["verdict"] == "fail" and "driver-too-old" in found["measured"]
    assert (
        found["remedy"]
        == "update the driver to 580.65.06 or newer, or carry a bundle of the image line"
        " train-cu126; "
        "or leave this GPU out: --gpus with the numbers of the others"
    )


def test_each_gpu_of_a_mixed_server_is_judged(tiny: Any, install: Callable, tmp_path: Path) -> None:
    ran = preflight(
        tiny,
        install,
        tmp_path,
        "Tesla V100-SXM2-32GB, 580.95.05, 7.0, 32768 MiB\nNVIDIA A100-SXM4-80GB, 580.95.05, 8.0,"
        " 81920 MiB",
    )
    assert [checks(ran)[f"gpu {n}"]["verdict"] for n in (0, 1)] == ["fail", "ok"]
    assert "train-cu126" in checks(ran)["gpu 0"]["remedy"]
    assert [line.split(", ")[2] for line in ran.out.splitlines() if line.startswith("gpu ")] == [
        "7.0",
        "8.0",
    ]


def test_without_nvidia_smi_the_kernel_tells_the_driver(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    tiny.pack(tmp_path / "b", line=CU130)
    docker_says(tmp_path / "bin")
    root = tmp_path / "root"
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       65536000 kB\n")
    text = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC"
        " 2023\nGCC version:  gcc version 12.2.0\n"
    )
    (root / "proc/driver/nvidia/version").write_text(text)
    path = f"{tmp_path / 'bin'}:{jail(tmp_path / 'jail')}"
    ran = install(tmp_path / "b", "preflight", "--facts", path=path, MILKTEA_HOST_ROOT=str(root))
    assert (
        checks(ran)["driver"]["measured"].startswith("535.104.05")
        and checks(ran)["driver"]["verdict"] == "fail"
    )


@pytest.mark.parametrize(
    ("device", "maker"), [("kfd", "AMD (ROCm)"), ("davinci_manager", "Ascend")]
)
def test_accelerators_of_other_makers_are_refused_in_words(
    tiny: Any, install: Callable, tmp_path: Path, device: str, maker: str
) -> None:
    tiny.pack(tmp_path / "b", line=CU130)
    docker_says(tmp_path / "bin")
    root = tmp_path / "root"
    for file in ("dev/" + device, "proc/meminfo"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("MemTotal:       65536000 kB\n")
    path = f"{tmp_path / 'bin'}:{jail(tmp_path / 'jail')}"
    ran = install(tmp_path / "b", "preflight", "--facts", path=path, MILKTEA_HOST_ROOT=str(root))
    found = checks(ran)["driver"]
    assert ran.code == 3 and found["verdict"] == "fail"
    assert f"GPUs are of {maker}, for which this project has no image" in found["remedy"]


@pytest.mark.parametrize(("machine", "named"), [("aarch64", "arm64"), ("ppc64le", "ppc64le")])
def test_processors_without_an_image_are_refused_in_words(
    tiny: Any, install: Callable, tmp_path: Path, machine: str, named: str
) -> None:
    script(tmp_path / "bin", "uname", f"case $1 in -m) echo {machine} ;; *) echo server ;; esac\n")
    found = checks(preflight(tiny, install, tmp_path))["platform"]
    assert found["verdict"] == "fail" and f"no image for {named}" in found["remedy"]


def test_no_driver_no_toolkit_and_an_old_engine_are_each_named(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    ran = preflight(tiny, install, tmp_path, version="19.03.15", runtimes='{"runc":{}}')
    found = checks(ran)
    assert ran.code == 3
    assert (
        found["driver"]["measured"] == "no NVIDIA driver"
        and "580.65.06" in found["driver"]["remedy"]
    )
    assert found["toolkit"]["verdict"] == "fail" and "nvidia-ctk" in found["toolkit"]["remedy"]
    assert found["engine"]["verdict"] == "fail" and "20.10" in found["engine"]["needed"]


def test_no_space_is_said_with_the_number_before_anything_is_copied(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    tiny.add_model()
    script(
        tmp_path / "bin",
        "df",
        'case "$*" in *-i*) echo h; echo "x 9 9 99999999 1% /" ;; *) echo h; echo "/dev/sda1 100 90'
        ' 3000 97% /" ;; esac\n',
    )
    ran = preflight(tiny, install, tmp_path, "NVIDIA H100, 580.95.05, 9.0, 1 MiB")
    found = checks(ran)["disk of the engine"]
    image = tiny.made().image
    layers = sum(x.size_bytes for x in image.layers)
    largest = max(
        sum(image.layers[k - 1].blob_bytes for k in part.carried)
        for part in parts.plan_parts(image, None)
    )
    assert ran.code == 3 and found["verdict"] == "fail" and "3072 KB free" in found["measured"]
    assert f"free {(layers + largest + 500_022 - 3_072_000) // 1000} KB there" in found["remedy"]
    assert not (tmp_path / "prefix").exists()


def test_the_containerd_store_is_counted_with_the_compressed_copies_that_it_keeps(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    plain = preflight(tiny, install, tmp_path)
    other = preflight(
        tiny, install, tmp_path, store='[["driver-type","io.containerd.snapshotter.v1"]]'
    )

    def kb(ran: Any) -> int:
        return int(checks(ran)["disk of the engine"]["needed"].split()[0])

    assert (
        checks(other)["store"]["measured"].startswith("containerd") and kb(other) - kb(plain) > 2000
    )


def test_a_folder_that_cannot_be_written_to_is_named(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b")
    (tmp_path / "ro").mkdir()
    inner = (
        f"mount -t tmpfs -o ro none {tmp_path}/ro && exec sh {tmp_path}/b/INSTALL.sh preflight"
        f" --facts --prefix {tmp_path}/ro/milktea"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inner], capture_output=True, text=True)
    if not done.stdout:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    found = read_checks(done.stdout)["folder"]
    assert (
        found["verdict"] == "fail"
        and f"{tmp_path}/ro cannot be written to" in found["measured"]
        and "--prefix DIR" in found["remedy"]
    )


def test_a_refused_install_leaves_nothing_behind(
    tiny: Any, install: Callable, tmp_path: Path
) -> None:
    tiny.pack(tmp_path / "b", line=CU130)
    before = sorted(p for p in tmp_path.rglob("*"))
    ran = install(tmp_path / "b", path=jail(tmp_path / "jail"))
    assert ran.code == 3 and "no docker command" in ran.out and "as it was before" in ran.err
    after = sorted(p for p in tmp_path.rglob("*") if "jail" not in p.parts)
    assert after == before


def test_a_bundle_on_read_only_media_is_verified_without_writing_to_it(
    packed: Path, install: Callable
) -> None:
    for p in (packed, *packed.rglob("*")):
        p.chmod(0o555 if p.is_dir() else 0o444)
    before = {p: p.stat().st_mtime_ns for p in packed.rglob("*")}
    assert install(packed, "verify").code == 0
    assert {p: p.stat().st_mtime_ns for p in packed.rglob("*")} == before
    for p in (packed, *packed.rglob("*")):
        p.chmod(0o755)


def test_wrong_words_are_answered_with_the_usage(packed: Path, install: Callable) -> None:
    assert install(packed, "instal").code == 2
    assert "usage: sh INSTALL.sh" in install(packed, "--help").out


def test_the_installer_is_clean_for_shellcheck(packed: Path) -> None:
    needs("shellcheck")
    command = [
        "shellcheck",
        "-s",
        "dash",
        "-S",
        "warning",
        "-e",
        "SC2086,SC2046,SC2154",
        str(packed / "INSTALL.sh"),
        str(packed / "tools/milktea-run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == ""
