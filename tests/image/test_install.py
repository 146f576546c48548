"""INSTALL.sh where it needs no engine: preflight, verify, repair. Real shells, real files, nothing stood in for but the
machine's own reports (nvidia-smi, docker info), which are recorded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ops.image.bundle import manifest as papers
from ops.image.bundle import parts as stair
from ops.image.bundle import signature as sign
from ops.image.bundle.contents import Options
from ops.image.bundle.inventory import Present
from ops.image.driver import Line

SHELLS = ["dash", "busybox ash", "bash"]
COREUTILS = (
    "basename cat chmod cp cut date dd df dirname head id ln mkdir mkfifo mktemp mv nproc printf rm sort stat sync tail tee timeout tr uname wc"
)
CU130 = Line("train-cu130", "13.0", ("7.5", "8.0", "9.0", "12.0"), ("12.0",))
CU126 = Line("train-cu126", "12.6", ("5.0", "6.0", "7.0", "7.5", "8.0", "9.0"))


@pytest.fixture
def packed(tiny: Any, tmp_path: Path, release_key: Path) -> Path:
    tiny.add_model().pack(tmp_path / "bundle", Options(parity_members=4, volume_bytes=250_000, key=release_key))
    return tmp_path / "bundle"


def jail(folder: Path, *more: str) -> str:
    """A PATH with sh, coreutils and nothing else."""
    folder.mkdir()
    for name in ["sh", "sha256sum", *COREUTILS.split(), *more]:
        found = shutil.which(name)
        assert found, f"{name} is not on this machine"
        (folder / name).symlink_to(found)
    return str(folder)


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text)
    (folder / name).chmod(0o755)


def a_volume(packed: Path, part: str = "cublas") -> Path:
    return sorted(p for p in (packed / "parts").iterdir() if part in p.name)[0]


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.unlink()  # never through a hard link
    file.write_bytes(data)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_whole_bundle_is_said_to_be_whole_in_every_shell(packed: Path, install: Callable, shell: str) -> None:
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    ran = install(packed, "verify", shell=shell)
    assert (ran.code, ran.err) == (0, "")
    assert "whole: 16 volumes, signature good" in ran.out


def test_verify_and_repair_need_nothing_but_sh_and_coreutils(packed: Path, install: Callable, tmp_path: Path) -> None:
    path = jail(tmp_path / "jail")
    ran = install(packed, "verify", path=path)
    assert ran.code == 0 and "hashed by sha256sum" in ran.out
    assert "neither ssh-keygen nor openssl here" in ran.out and "SHA256SUMS is " in ran.out
    volume = a_volume(packed)
    volume.unlink()
    ran = install(packed, "repair", path=path)
    assert ran.code == 4 and f"cannot be rebuilt: parts/{volume.name}" in ran.err and "repair on another machine" in ran.err


def test_where_coreutils_has_b2sum_it_checks_the_volumes_and_repair_believes_it(packed: Path, install: Callable, tmp_path: Path) -> None:
    path = jail(tmp_path / "jail", "b2sum")
    ran = install(packed, "verify", path=path)
    assert ran.code == 0 and "hashed by b2sum" in ran.out
    for row in (packed / "PLAN").read_text().splitlines():
        if row.startswith(("vol ", "parity ")):
            _, volume, _, _, _, digest = row.split()
            assert digest == hashlib.blake2b((packed / volume).read_bytes(), digest_size=32).hexdigest()
    volume = a_volume(packed)
    before = volume.read_bytes()
    flip(volume, 77)
    ran = install(packed, "verify", path=path)
    assert ran.code == 4 and f"parts/{volume.name}: damaged" in ran.out
    (tmp_path / "jail/perl").symlink_to("/usr/bin/perl")
    assert install(packed, "repair", path=path).code == 0
    assert next((tmp_path / "prefix/repaired").rglob(volume.name)).read_bytes() == before


@pytest.mark.parametrize("tool", ["perl", "python3"])
def test_a_lost_volume_of_each_group_is_rebuilt_identical(packed: Path, install: Callable, tmp_path: Path, tool: str) -> None:
    (tmp_path / "tool").mkdir()
    real = "/usr/bin/perl" if tool == "perl" else os.path.realpath(sys.executable)
    (tmp_path / "tool" / tool).symlink_to(real)
    path = f"{jail(tmp_path / 'jail')}:{tmp_path / 'tool'}"
    groups: dict[str, str] = {}
    for line in (packed / "PLAN").read_text().splitlines():
        if line.startswith("vol "):
            _, volume, _, _, group, _ = line.split()
            groups[group] = volume
    before = {v: (packed / v).read_bytes() for v in groups.values()}
    assert len(before) == 4
    for volume in before:
        (packed / volume).unlink()
    ran = install(packed, "repair", path=path, prefix=tmp_path / "p")
    assert ran.code == 0, ran.err
    rebuilt = next((tmp_path / "p" / "repaired").iterdir())
    assert {v: (rebuilt / v).read_bytes() for v in before} == before
    assert "16 volumes, all there" in install(packed, "preflight", prefix=tmp_path / "p").out


def test_two_lost_volumes_of_one_group_are_named_and_nothing_is_invented(packed: Path, install: Callable, tmp_path: Path) -> None:
    rows = [line.split() for line in (packed / "PLAN").read_text().splitlines() if line.startswith("vol ")]
    first, second = [r[1] for r in rows if r[4] == "02"][:2]
    (packed / first).unlink()
    flip(packed / second, 1000)
    ran = install(packed, "repair")
    assert ran.code == 4 and first in ran.err and second in ran.err and "parity group 02" in ran.err and "copy again" in ran.err


def test_a_lost_parity_file_alone_is_no_reason_to_stop(packed: Path, install: Callable) -> None:
    (packed / "parity" / "P.01").unlink()
    assert install(packed, "repair").code == 0
    ran = install(packed, "verify")
    assert ran.code == 4 and "parity/P.01" in ran.err


def test_a_volume_may_lie_on_another_disk(packed: Path, install: Callable, tmp_path: Path) -> None:
    (tmp_path / "disk2" / "parts").mkdir(parents=True)
    volume = a_volume(packed)
    volume.rename(tmp_path / "disk2" / "parts" / volume.name)
    assert install(packed, "verify").code == 4
    assert install(packed, "verify", "--also", str(tmp_path / "disk2")).code == 0


def test_a_damaged_volume_here_is_taken_whole_from_the_other_disk(packed: Path, install: Callable, tmp_path: Path) -> None:
    volume = a_volume(packed)
    (tmp_path / "disk2" / "parts").mkdir(parents=True)
    shutil.copy(volume, tmp_path / "disk2" / "parts")
    flip(volume, 5)
    assert install(packed, "verify", "--also", str(tmp_path / "disk2")).code == 0


def test_parts_of_two_bundles_mixed_are_found_out(tiny: Any, packed: Path, install: Callable, tmp_path: Path) -> None:
    tiny.contents["trainer"] = {"app/train.py": b"print('two')\n"}
    tiny.pack(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "PLAN", packed / "PLAN")
    ran = install(packed, "verify")
    assert ran.code == 4 and "PLAN is damaged, or belongs to another bundle" in ran.err


def test_a_wrong_signature_stops_everything(packed: Path, install: Callable, tmp_path: Path) -> None:
    sign.make_key(tmp_path / "stranger")
    sign.sign(packed / "SHA256SUMS", tmp_path / "stranger")
    ran = install(packed, "verify")
    assert ran.code == 5 and "wrong signature" in ran.err and "another way than this disk" in ran.err


def test_a_whole_new_bundle_by_a_stranger_is_refused_with_the_key_that_came_another_way(
    tiny: Any, install: Callable, tmp_path: Path, release_key: Path
) -> None:
    sign.make_key(tmp_path / "stranger")
    tiny.pack(tmp_path / "theirs", Options(key=tmp_path / "stranger"))
    assert "not compared with anything" in install(tmp_path / "theirs", "verify").out
    ran = install(tmp_path / "theirs", "verify", "--key", f"{release_key}.pub")
    assert ran.code == 5 and "given by --key" in ran.err


def test_the_key_of_the_first_install_binds_the_next_bundles(tiny: Any, packed: Path, install: Callable, tmp_path: Path) -> None:
    keys = tmp_path / "prefix" / "keys"
    keys.mkdir(parents=True)
    shutil.copy(packed / "keys" / "allowed_signers", keys)
    assert "with the key of the first install here" in install(packed, "verify").out
    tiny.pack(tmp_path / "unsigned")
    ran = install(tmp_path / "unsigned", "verify")
    assert ran.code == 5 and "not signed" in ran.err


def test_a_signature_that_was_left_out_is_missed(packed: Path, install: Callable) -> None:
    (packed / "SHA256SUMS.openssl").unlink()
    ran = install(packed, "verify")
    assert ran.code == 4 and "SHA256SUMS.openssl is missing" in ran.err


def test_without_ssh_keygen_openssl_checks_the_signature(packed: Path, install: Callable, tmp_path: Path) -> None:
    path = jail(tmp_path / "jail", "openssl")
    assert "good, by openssl" in install(packed, "verify", path=path).out
    flip(packed / "SHA256SUMS.openssl", 40)
    assert install(packed, "verify", path=path).code == 5


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
        ["sh", str(folder / "INSTALL.sh"), "verify", "--prefix", str(scratch / "p")], capture_output=True, text=True, errors="replace", timeout=60,
        cwd=scratch,  # a README that took the script's place is run as one, and it says how to write a file
    )  # fmt: skip
    shutil.rmtree(folder)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return f"{how}: accepted: {said}"
    if names & {"INSTALL.sh"}:
        return ""  # a damaged script stops in its own way; what counts is that it does not say yes
    if names <= {"SHA256SUMS", "SHA256SUMS.sig"}:
        named = any(word in said for word in ("signature", "SHA256SUMS", *names)) or "damaged" in said
    else:
        named = any(name in said for name in names) or "wrong signature" in said
    remedy = any(word in said for word in ("do this: copy", "do this: sh INSTALL.sh repair", "do this: do not install it"))
    return "" if named and remedy else f"{how}: not named: {said}"


def corruptions(packed: Path, scratch: Path, seeds: range) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return [bad for bad in pool.map(lambda s: one_corruption(packed, scratch, s), seeds) if bad]


def test_forty_corruptions_are_all_caught_named_and_given_a_remedy(packed: Path, tmp_path: Path) -> None:
    assert corruptions(packed, tmp_path / "trials", range(40)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_corruptions_are_all_caught_named_and_given_a_remedy(packed: Path, tmp_path: Path) -> None:
    assert corruptions(packed, tmp_path / "trials", range(1000, 2000)) == []


# -- preflight -------------------------------------------------------------------------------------------------------------


def docker_says(folder: Path, version: str = "24.0.7", runtimes: str = '{"nvidia":{},"runc":{}}', root: str = "/", store: str = "[]") -> None:
    """A docker command with an engine's recorded answers and no images."""
    script(folder, "docker", f"""case "$*" in
    *Server.Version*) echo '{version}' ;; *DriverStatus*) echo '{store}' ;; *Runtimes*) echo '{runtimes}' ;;
    *DockerRootDir*) echo '{root}' ;; *"{{{{.Driver}}}}"*) echo overlay2 ;; esac\n""")  # fmt: skip


def checks(ran: Any) -> dict[str, dict[str, str]]:
    return {c["check"]: c for c in ran.json()["checks"]}


def preflight(tiny: Any, install: Callable, tmp_path: Path, gpus: str = "", line: Line = CU130, **engine: str) -> Any:
    """The preflight of a CUDA bundle on a machine with these GPUs (nvidia-smi's CSV)."""
    if not (tmp_path / "b").exists():
        tiny.pack(tmp_path / "b", line=line, lines=(CU130, CU126))
    docker_says(tmp_path / "bin", **engine)
    if gpus:
        script(tmp_path / "bin", "nvidia-smi", f"echo '{gpus}'\n")
    path = f"{tmp_path / 'bin'}:{jail(tmp_path / 'jail') if not (tmp_path / 'jail').exists() else tmp_path / 'jail'}"
    return install(tmp_path / "b", "preflight", "--json", path=path)


def test_a_ready_server_passes_every_check_and_each_says_measured_needed_and_remedy(tiny: Any, install: Callable, tmp_path: Path) -> None:
    ran = preflight(tiny, install, tmp_path, "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559 MiB")
    assert ran.code == 0, ran.err
    found = checks(ran)
    assert {"platform", "engine", "store", "toolkit", "bundle", "disk of the engine", "folder", "memory", "shm", "gpu 0"} <= set(found)
    assert all(c["verdict"] in ("ok", "warn") and c["measured"] and c["needed"] and c["remedy"] for c in found.values())


def test_a_driver_that_is_too_old_is_refused_with_the_image_line_that_fits(tiny: Any, install: Callable, tmp_path: Path) -> None:
    ran = preflight(tiny, install, tmp_path, "NVIDIA GeForce RTX 3090, 535.104.05, 8.6, 24576 MiB")
    assert ran.code == 3
    found = checks(ran)["gpu 0"]
    assert found["verdict"] == "fail" and "driver-too-old" in found["measured"]
    assert found["remedy"] == "update the driver to 580.65.06 or newer, or carry a bundle of the image line train-cu126"


def test_each_gpu_of_a_mixed_server_is_judged(tiny: Any, install: Callable, tmp_path: Path) -> None:
    ran = preflight(tiny, install, tmp_path, "Tesla V100-SXM2-32GB, 580.95.05, 7.0, 32768 MiB\nNVIDIA A100-SXM4-80GB, 580.95.05, 8.0, 81920 MiB")
    assert [checks(ran)[f"gpu {n}"]["verdict"] for n in (0, 1)] == ["fail", "ok"]
    assert "train-cu126" in checks(ran)["gpu 0"]["remedy"]
    assert [g["capability"] for g in ran.json()["gpus"]] == ["7.0", "8.0"]


def test_without_nvidia_smi_the_kernel_tells_the_driver(tiny: Any, install: Callable, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b", line=CU130)
    docker_says(tmp_path / "bin")
    root = tmp_path / "root"
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       65536000 kB\n")
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.2.0\n"
    (root / "proc/driver/nvidia/version").write_text(text)
    path = f"{tmp_path / 'bin'}:{jail(tmp_path / 'jail')}"
    ran = install(tmp_path / "b", "preflight", "--json", path=path, MILKTEA_HOST_ROOT=str(root))
    assert checks(ran)["driver"]["measured"] == "535.104.05" and checks(ran)["driver"]["verdict"] == "fail"


def test_no_driver_no_toolkit_and_an_old_engine_are_each_named(tiny: Any, install: Callable, tmp_path: Path) -> None:
    ran = preflight(tiny, install, tmp_path, version="19.03.15", runtimes='{"runc":{}}')
    found = checks(ran)
    assert ran.code == 3
    assert found["driver"]["measured"] == "no NVIDIA driver" and "580.65.06" in found["driver"]["remedy"]
    assert found["toolkit"]["verdict"] == "fail" and "nvidia-ctk" in found["toolkit"]["remedy"]
    assert found["engine"]["verdict"] == "fail" and "20.10" in found["engine"]["needed"]


def test_no_space_is_said_with_the_number_before_anything_is_copied(tiny: Any, install: Callable, tmp_path: Path) -> None:
    tiny.add_model()
    script(tmp_path / "bin", "df", 'case "$*" in *-i*) echo h; echo "x 9 9 99999999 1% /" ;; *) echo h; echo "/dev/sda1 100 90 3000 97% /" ;; esac\n')
    ran = preflight(tiny, install, tmp_path, "NVIDIA H100, 580.95.05, 9.0, 1 MiB")
    found = checks(ran)["disk of the engine"]
    image = tiny.cargo().image
    layers = sum(x.size_bytes for x in image.layers)
    largest = max(sum(x.blob_bytes for x in image.layers[step.first - 1 : step.last]) for step in stair.plan_steps(image, None))
    assert ran.code == 3 and found["verdict"] == "fail" and "3072 KB free" in found["measured"]
    held = papers.kept(tiny.cargo(CU130, (CU130, CU126)))
    kept = sum(map(len, held.by_hash().values())) + sum(x.blob_bytes for x in held.layers.values())
    assert f"free {(layers + largest + 500_022 + kept - 3_072_000) // 1000} KB there" in found["remedy"]
    assert not (tmp_path / "prefix").exists()


def test_the_containerd_store_is_counted_with_the_compressed_copies_that_it_keeps(tiny: Any, install: Callable, tmp_path: Path) -> None:
    plain = preflight(tiny, install, tmp_path)
    other = preflight(tiny, install, tmp_path, store='[["driver-type","io.containerd.snapshotter.v1"]]')

    def kb(ran: Any) -> int:
        return int(checks(ran)["disk of the engine"]["needed"].split()[0])

    assert checks(other)["store"]["measured"] == "containerd" and kb(other) - kb(plain) > 2000


def test_a_folder_that_cannot_be_written_to_is_named(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b")
    (tmp_path / "ro").mkdir()
    inner = f"mount -t tmpfs -o ro none {tmp_path}/ro && exec sh {tmp_path}/b/INSTALL.sh preflight --json --prefix {tmp_path}/ro/milktea"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inner], capture_output=True, text=True)
    if not done.stdout:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    found = {c["check"]: c for c in json.loads(done.stdout)["checks"]}["folder"]
    assert found["verdict"] == "fail" and f"{tmp_path}/ro cannot be written to" in found["measured"] and "--prefix DIR" in found["remedy"]


def test_a_refused_install_leaves_nothing_behind(tiny: Any, install: Callable, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b", line=CU130)
    before = sorted(p for p in tmp_path.rglob("*"))
    ran = install(tmp_path / "b", path=jail(tmp_path / "jail"))
    assert ran.code == 3 and "no docker command" in ran.out and "as it was before" in ran.err
    after = sorted(p for p in tmp_path.rglob("*") if "jail" not in p.parts)
    assert after == before


def test_a_bundle_on_read_only_media_is_verified_without_writing_to_it(packed: Path, install: Callable) -> None:
    for p in (packed, *packed.rglob("*")):
        p.chmod(0o555 if p.is_dir() else 0o444)
    before = {p: p.stat().st_mtime_ns for p in packed.rglob("*")}
    assert install(packed, "verify").code == 0
    assert {p: p.stat().st_mtime_ns for p in packed.rglob("*")} == before
    for p in (packed, *packed.rglob("*")):
        p.chmod(0o755)


def test_verify_answers_in_json_for_programs(packed: Path, install: Callable) -> None:
    volume = a_volume(packed)
    flip(volume, 9)
    ran = install(packed, "verify", "--json")
    assert ran.code == 4
    assert json.loads(ran.out)["bad"] == [{"file": f"parts/{volume.name}", "why": "damaged, or of another bundle"}]


def test_wrong_words_are_answered_with_the_usage(packed: Path, install: Callable) -> None:
    assert install(packed, "instal").code == 2
    assert "usage: sh INSTALL.sh" in install(packed, "--help").out


def test_the_installer_is_clean_for_shellcheck(packed: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not on this machine")
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


INSTALL = Path(__file__).parents[2] / "ops/image/server/install"


def copied(packed: Path, tmp_path: Path, volumes: str, size: int, path: str) -> subprocess.CompletedProcess[str]:
    """copy_model_file of INSTALL.sh, called by itself."""
    parts = "".join((INSTALL / name).read_text() for name in ("10-plan.sh", "40-verify.sh", "50-load.sh"))
    has = "has() { command -v $1 >/dev/null 2>&1; }\n"
    call = f"BUNDLE={packed} WORK={tmp_path} PREFIX={tmp_path} ALSO= ID=x\nchoose_hasher\ncopy_model_file {volumes} {tmp_path}/copy {size}"
    return subprocess.run(["sh", "-c", has + parts + call], capture_output=True, text=True, env={"PATH": path})


@pytest.mark.parametrize("hasher", ["openssl", "b2sum", "sha256sum"])
def test_a_model_file_arrives_whole_from_one_volume_or_several_and_a_flipped_bit_is_found(packed: Path, tmp_path: Path, hasher: str) -> None:
    path = jail(tmp_path / "jail", *([hasher] if hasher != "sha256sum" else []))
    rows = [line.split() for line in (packed / "PLAN").read_text().splitlines() if line.startswith("mfile ")]
    cut = next(row for row in rows if "," in row[5])
    whole = next(row for row in rows if "," not in row[5] and "safetensors" in row[4])
    for _, _, size, digest, _, volumes in (cut, whole):
        ran = copied(packed, tmp_path, volumes, int(size), path)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == digest
        flip(packed / volumes.split(",")[-1], 7)
        assert copied(packed, tmp_path, volumes, int(size), path).returncode != 0
    assert copied(packed, tmp_path, "models/none", 1, path).returncode != 0


def installed_models(packed: Path, tmp_path: Path, path: str, shell: str = "sh", lend: int = 1) -> subprocess.CompletedProcess[str]:
    """install_models of INSTALL.sh, called by itself where the engine has the image; `lend` is from how many bytes on it hashes."""
    text = "".join((INSTALL / name).read_text() for name in ("00-head.sh", "10-plan.sh", "30-preflight.sh", "40-verify.sh", "50-load.sh"))
    call = f"BUNDLE={packed} WORK={tmp_path}/work PREFIX={tmp_path}/prefix ID=x STAGES='' STAIR=s REPO=r REF=mtb/tiny:1 LEND={lend}\n"
    call += "exec 3>&1\nchoose_hasher\ninstall_models"
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    (tmp_path / "work").mkdir()
    program, *words = shell.split()
    return subprocess.run([shutil.which(program) or program, *words, "-c", f"{text}\n{call}"], capture_output=True, text=True, env={"PATH": path})


def model_at(packed: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Where the model goes, and the SHA-256 of each of its files."""
    rows = [line.split() for line in (packed / "PLAN").read_text().splitlines() if line.startswith("mfile ")]
    return tmp_path / "prefix/models" / rows[0][1], {row[4]: row[3] for row in rows}


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != ".sha256"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("own", [["b2sum"], []], ids=["b2sum", "sha256sum"])
def test_on_a_bare_server_the_image_lends_its_python_to_hash_models_and_gets_no_network(
    packed: Path, tmp_path: Path, own: list[str], shell: str
) -> None:
    # the container's part is played by this machine's Python: what it is asked for, and that its answer is believed, is what counts
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    python = os.path.realpath(sys.executable)
    script(tmp_path / "bin", "docker", f"""[ "$1" = run ] || exit 1
    echo $* | tr '\\n' ' ' >>{tmp_path}/asked
    while [ "$1" != mtb/tiny:1 ]; do shift; done; shift; exec {python} "$@"\n""")  # fmt: skip
    path = f"{jail(tmp_path / 'jail', *own)}:{tmp_path / 'bin'}"
    with (packed / "PLAN").open("a") as plan:
        plan.write("evidence python3\n")
    folder, wanted = model_at(packed, tmp_path)
    volumes = sorted(p for p in (packed / "models").rglob("*") if p.is_file())
    assert len(volumes) == 4, "two files of weights, one of them cut in two, and a config"
    flip(volumes[-1], 7)
    ran = installed_models(packed, tmp_path, path, shell)
    assert ran.returncode == 4 and volumes[-1].name in ran.stderr and not folder.exists()
    flip(volumes[-1], 7)
    asked = (tmp_path / "asked").read_text()
    (tmp_path / "asked").unlink()
    ran = installed_models(packed, tmp_path, path, shell)
    assert (ran.returncode, ran.stderr) == (0, "") and hashes(folder) == wanted
    assert f"-v {volumes[-1]}:" in (tmp_path / "asked").read_text() != asked, "files that proved right are not asked for again"
    shutil.rmtree(tmp_path / "prefix")
    (tmp_path / "asked").unlink()
    ran = installed_models(packed, tmp_path, path, shell)
    assert (ran.returncode, ran.stderr) == (0, "") and hashes(folder) == wanted
    asked = (tmp_path / "asked").read_text()
    assert asked.count("run --rm -i --network=none --read-only --cap-drop=ALL") == 1, "one container for all"
    assert all(f"-v {v}:{v}:ro" in asked for v in volumes) and str(folder.parent) not in asked
    shutil.rmtree(tmp_path / "prefix")
    (tmp_path / "asked").unlink()
    ran = installed_models(packed, tmp_path, path, shell, lend=10**9)
    assert ran.returncode == 0 and not (tmp_path / "asked").exists(), "a small model is hashed sooner than a container starts"


@pytest.mark.parametrize("answers", ["exit 125", "echo 1234 '*x'; exit 1", "exit 0", None], ids=["no container", "dies", "dumb", "no Python"])
def test_where_the_image_cannot_hash_models_the_server_does_it_itself(packed: Path, tmp_path: Path, answers: str | None) -> None:
    script(tmp_path / "bin", "docker", f"{answers}\n")
    if answers:
        with (packed / "PLAN").open("a") as plan:
            plan.write("evidence python3\n")
    path = f"{jail(tmp_path / 'jail', 'b2sum')}:{tmp_path / 'bin'}"
    folder, wanted = model_at(packed, tmp_path)
    volume = next((packed / "models").rglob("*.safetensors*"))
    flip(volume, 7)
    ran = installed_models(packed, tmp_path, path)
    assert ran.returncode == 4 and volume.name in ran.stderr and not folder.exists()
    flip(volume, 7)
    ran = installed_models(packed, tmp_path, path)
    assert (ran.returncode, ran.stderr) == (0, "") and hashes(folder) == wanted


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_joins_neighbouring_archives_into_one_for_the_containerd_store(packed: Path, tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    text = "".join((INSTALL / name).read_text() for name in ("10-plan.sh", "45-kept.sh", "50-load.sh"))
    rows = [line.split()[1:] for line in (packed / "PLAN").read_text().splitlines() if line.startswith("step ")]
    (tmp_path / "steps").write_text("".join(f"{' '.join(row)} -\n" for row in rows))
    layers = [line.split()[1:] for line in (packed / "FACTS").read_text().splitlines() if line.startswith("layer ")]
    (tmp_path / "layers").write_text("".join(f"{' '.join(row)} other\n" for row in layers))

    def run(call: str, **settings: object) -> bytes:
        known = {"BUNDLE": packed, "WORK": tmp_path, "PREFIX": tmp_path, "ALSO": "", "ID": "x", "START": 0, "CONTAINERD": "yes"} | settings
        ran = subprocess.run([*shell.split(), "-c", f"{text}\n{' '.join(f'{k}={v}' for k, v in known.items())}\n{call}"], capture_output=True)
        assert (ran.returncode, ran.stderr) == (0, b"")
        return ran.stdout

    def joined(**settings: object) -> list[list[str]]:
        return [line.split() for line in run(f"join_steps <{tmp_path}/steps", **settings).decode().splitlines()]

    assert len(rows) > 2 and any("," in row[2] for row in rows), "several archives, one of them cut into volumes"
    single = [[*row, "-"] for row in rows]
    assert joined() == [[rows[0][0], rows[-1][1], "+".join(row[2] for row in rows), "-", "-"]]
    assert joined(CONTAINERD="") == single, "other stores unpack the archive beside the layers: one at a time"
    assert joined(AT_ONCE=1) == single
    assert joined(START=rows[0][1])[0][0] == rows[1][0], "what is here is not joined to what is not"
    borrowing = f"sed 's/- -$/- yes/' {tmp_path}/steps | join_steps"
    assert len(run(borrowing).splitlines()) == len(rows)
    sizes = [sum(int(layer[4]) for layer in layers[int(row[0]) - 1 : int(row[1])]) for row in rows]
    assert joined(AT_ONCE=sum(sizes[:2]))[0][:2] == [rows[0][0], rows[1][1]]
    with tarfile.open(fileobj=io.BytesIO(run(f"join_parts {joined()[0][2]}"))) as whole:
        index = json.load(whole.extractfile("index.json"))  # of members of one name the last one counts, here and for containerd
        assert index["manifests"][0]["annotations"]["io.containerd.image.name"].endswith(str(tiny_ref(packed)))
        for layer in layers:
            blob = whole.extractfile(f"blobs/sha256/{layer[3]}")
            assert blob is not None and hashlib.sha256(blob.read()).hexdigest() == layer[3]


def tiny_ref(packed: Path) -> str:
    return next(line.split()[1] for line in (packed / "FACTS").read_text().splitlines() if line.startswith("ref "))


@pytest.mark.slow
def test_installing_a_model_costs_no_more_than_a_copy_and_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import measure

    took = measure.model(0.5, tmp_path)
    assert took["INSTALL.sh (copy, hash, sync)"] < 1.1 * (took["cp, sync"] + took["openssl dgst -sha256"])


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_makes_the_files_of_an_update_to_the_byte(tiny: Any, tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    tiny.contents["trainer"] = {f"app/{n}.py": random.Random(n).randbytes(9_000) for n in range(10)}
    kept, base = tiny.kept(), Present(ref="before", layers=tiny.cargo().image.diff_ids)
    folder = tmp_path / "prefix" / "kept" / "tiny" / "before"
    folder.mkdir(parents=True)
    for digest, path in kept.items():
        shutil.copy(path, folder / digest)
    tiny.contents["trainer"]["app/3.py"] = random.Random(30).randbytes(9_000)
    tiny.pack(tmp_path / "b", Options(base=base, kept=kept, volume_bytes=10_000))
    wanted = papers.kept(tiny.cargo()).files(without=base.layers)
    text = "".join((INSTALL / name).read_text() for name in ("00-head.sh", "10-plan.sh", "45-kept.sh")).replace("$(dirname \"$0\")", ".")
    call = f"{text}\nBUNDLE={tmp_path}/b WORK={tmp_path}/work PREFIX={tmp_path}/prefix\nchoose_hasher\nis_a_bundle\nread_plan\n"
    call += "rows keep | while read -r _ _ f; do [ -f $BUNDLE/$f ] || { can_restore $f && restore $f; } || echo $f; done"
    (tmp_path / "work").mkdir()
    ran = subprocess.run([*shell.split(), "-c", call], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    made = {str(p.relative_to(tmp_path / "work/restored")): p.read_bytes() for p in (tmp_path / "work/restored").rglob("*") if p.is_file()}
    assert {"layers/trainer", "layers/wheel-a", "image.lock", "FACTS", "image/head.tar"} <= set(made)
    assert all(made[path] == (data if isinstance(data, bytes) else data.read_bytes()) for path, data in wanted.items() if path in made)
    lock = [digest for digest, path in kept.items() if path and path.read_bytes().startswith(b"# Written")]
    (folder / lock[0]).unlink()
    shutil.rmtree(tmp_path / "work/restored")
    ran = subprocess.run([*shell.split(), "-c", call], capture_output=True, text=True)
    assert ran.stdout == "image.lock\n" and not (tmp_path / "work/restored/image.lock").exists()
    for digest in kept:
        (folder / digest).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "work/restored")
    ran = subprocess.run([*shell.split(), "-c", call], capture_output=True, text=True)
    assert ran.returncode == 3 and "FACTS cannot be made" in ran.stderr and "--also DIR" in ran.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_writes_the_header_of_a_tar_member_as_tarfile_does(shell: str) -> None:
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    text = (INSTALL / "50-load.sh").read_text()
    for size in (0, 9, 1_234_567_890):
        entry = tarfile.TarInfo(f"blobs/sha256/{hashlib.sha256(bytes(size % 7)).hexdigest()}")
        entry.size, entry.mode = size, 0o644
        ran = subprocess.run([*shell.split(), "-c", f"{text}\ntar_header {entry.name} {size}"], capture_output=True)
        assert (ran.stdout, ran.stderr) == (entry.tobuf(tarfile.GNU_FORMAT), b"")
