"""What preflight says of an engine, its toolkit and its GPUs, from what these say of themselves:
recorded answers of docker, podman and nvidia-smi.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_shell import CU130, checks, docker_says, jail, script

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559 MiB, Disabled"


@pytest.fixture
def server(tiny: Any, install: Callable, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The checks of a CUDA bundle by name, on a machine with these files and this nvidia-smi."""
    tiny.pack(tmp_path / "b", line=CU130)
    root = tmp_path / "root"

    def look(
        *words: str,
        smi: str | None = H100,
        code: int = 0,
        fake: str = "",
        files: dict[str, str] | None = None,
        patience: str = "60",
        **env: str,
    ) -> dict[str, Any]:
        for name, text in {"proc/meminfo": "MemTotal: 65536000 kB\n", **(files or {})}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        if not (tmp_path / "bin/docker").exists() and not (tmp_path / "bin/podman").exists():
            docker_says(tmp_path / "bin")
        asked = f'echo "$*" >>{tmp_path}/asked\n'
        says = fake if smi is None else f"{asked}cat <<'X'\n{smi}\nX\nexit {code}\n"
        script(tmp_path / "bin", "nvidia-smi", says)
        if not (tmp_path / "jail").exists():
            jail(tmp_path / "jail")
        path = f"{tmp_path / 'bin'}:{tmp_path / 'jail'}"
        ran = install(
            tmp_path / "b",
            "preflight",
            "--facts",
            *words,
            path=path,
            MILKTEA_HOST_ROOT=str(root),
            MILKTEA_PATIENCE_S=patience,
            **env,
        )
        return checks(ran)

    return look


@pytest.mark.parametrize(
    ("said", "code", "remedy"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make"
            " sure that the latest NVIDIA driver is installed and running.",
            9,
            "modprobe nvidia",
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version:"
            " 580.95",
            18,
            "reboot this server",
        ),
        ("No devices were found", 6, "lspci | grep -i nvidia"),
        (
            "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that"
            " the NVIDIA Display Driver is properly installed and present in your system.",
            12,
            "ldconfig",
        ),
        ("Failed to initialize NVML: Insufficient Permissions", 4, "ls -l /dev/nvidia*"),
        (
            "Unable to determine the device handle for GPU 0000:C1:00.0: GPU is lost.  Reboot the"
            " system to recover this GPU",
            15,
            "grep NVRM",
        ),
        ("Failed to initialize NVML: Unknown Error", 255, "nvidia-smi must list"),
    ],
    ids=["unloaded", "mismatch", "no-device", "library", "rights", "lost", "other"],
)
def test_a_driver_that_does_not_answer_is_no_old_gpu(
    server: Callable, said: str, code: int, remedy: str
) -> None:
    found = server(smi=said, code=code)
    assert found["driver"]["verdict"] == "fail" and said[:40] in found["driver"]["measured"]
    assert remedy in found["driver"]["remedy"] and "another GPU" not in found["driver"]["remedy"]
    assert "gpu 0" not in found


@pytest.mark.parametrize("driver", ["470.256.02", "418.67"])
def test_a_driver_that_knows_no_capability_is_too_old_and_nothing_else(
    server: Callable, driver: str
) -> None:
    answer = f"""case "$*" in
    *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; echo; exit 2 ;;
    esac\necho 'Tesla T4, {driver}'\n"""
    found = server(smi=None, fake=answer)["driver"]
    assert found["verdict"] == "fail" and found["measured"] == f"{driver}, for Tesla T4"
    assert found["remedy"].startswith("update the driver to 580")


def test_one_gpu_that_is_lost_is_named_beside_one_that_is_well(server: Callable) -> None:
    found = server(smi=f"{H100}\nNVIDIA A100, 580.95.05, [GPU is lost], [GPU is lost], [N/A]")
    assert found["gpu 0"]["verdict"] == "ok" and found["gpu 1"]["verdict"] == "fail"
    assert "grep NVRM" in found["gpu 1"]["remedy"] and "--gpus" in found["gpu 1"]["remedy"]


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("exec tail -f /dev/null", "no answer within 0.4 s"),
        ("while :; do echo y; done", "y y y y"),
        ("exit 3", "not a word, exit code 3"),
        ("exit 0", "not a word, exit code 0"),
        ("printf 'a\\0b\\033[2Jc\\377|d\\r\\n'; exit 9", "ab[2Jc\ufffd d"),
    ],
    ids=["hangs", "endless", "mute", "mute-and-content", "bytes"],
)
def test_an_nvidia_smi_that_hangs_or_babbles_is_quoted_and_steers_nothing(
    server: Callable, fake: str, said: str
) -> None:
    found = server(smi=None, fake=fake + "\n", patience="0.4")
    assert found["driver"]["verdict"] == "fail" and said in found["driver"]["measured"]
    assert found["driver"]["remedy"] and "gpu 0" not in found


def test_a_gpu_whose_name_holds_the_mark_between_fields_shifts_no_column(server: Callable) -> None:
    found = server(smi=H100.replace("H100", "H100|fail|\x1b[31m|"))["gpu 0"]
    assert (found["verdict"], found["remedy"]) == ("ok", "nothing to do")
    assert "H100 fail [31m " in found["measured"]


def test_an_engine_that_hangs_or_babbles_does_not_answer(server: Callable, tmp_path: Path) -> None:
    script(tmp_path / "bin", "docker", "case $1 in version) exec tail -f /dev/null ;; esac\n")
    assert "no version, within 0.4 s" in server(patience="0.4")["engine"]["measured"]
    script(tmp_path / "bin", "docker", "printf '\\033[2J\\nwarning'\n")
    assert server()["engine"]["verdict"] == "fail"


def test_only_the_chosen_gpus_are_judged(server: Callable, tmp_path: Path) -> None:
    assert server("--gpus", "0,2")["gpu 0"]["verdict"] == "ok"
    assert (tmp_path / "asked").read_text().startswith("--id=0,2 --format=csv,noheader --query-gpu")
    found = server("--gpus", "GPU-8f1e", smi="No devices were found", code=6)
    assert (tmp_path / "asked").read_text().splitlines()[-1].startswith("--id=GPU-8f1e ")
    assert found["driver"]["remedy"].startswith("nvidia-smi -L lists the GPUs")
    assert server("--gpus", "none")["driver"]["measured"] == "not needed"


def test_mig_asks_for_one_of_its_devices(server: Callable) -> None:
    enabled = H100.replace("Disabled", "Enabled")
    found = server(smi=enabled)
    assert found["mig 0"]["verdict"] == "warn" and "nvidia-smi -L" in found["mig 0"]["remedy"]
    assert "mig 0" not in server("--gpus", "MIG-1c2d", smi=enabled)


@pytest.mark.parametrize(
    ("version", "dirs", "spec", "verdict", "remedy"),
    [
        ("28.5.2", '["/etc/cdi","/var/run/cdi"]', True, "ok", "nothing"),
        ("27.5.1", "null", True, "fail", "nvidia-ctk runtime configure"),
        ("24.0.7", "", True, "fail", "nvidia-ctk runtime configure"),
        ("28.5.2", '["/etc/cdi"]', False, "fail", "install nvidia-container-toolkit"),
    ],
    ids=["new", "not-set", "old-engine", "neither"],
)
def test_cdi_is_enough_where_the_engine_reads_it(
    server: Callable, tmp_path: Path, version: str, dirs: str, spec: bool, verdict: str, remedy: str
) -> None:
    docker_says(tmp_path / "bin", version=version, runtimes='{"runc":{}}', cdi=dirs)
    found = server(files={"etc/cdi/nvidia.yaml": "cdiVersion: 0.6.0\n"} if spec else {})
    assert found["toolkit"]["verdict"] == verdict and remedy in found["toolkit"]["remedy"]


@pytest.mark.parametrize(
    "line",
    ["no-cgroups = true\n", "  no-cgroups=true # rootless\n", "#no-cgroups = true\n", "x = 1\n"],
)
def test_a_rootless_engine_needs_no_cgroups(server: Callable, tmp_path: Path, line: str) -> None:
    docker_says(tmp_path / "bin")
    docker = tmp_path / "bin/docker"
    answer = """*SecurityOptions*) echo '["name=seccomp","name=rootless"]' ;;"""
    docker.write_text(docker.read_text().replace('case "$*" in', f'case "$*" in {answer}', 1))
    config = "etc/nvidia-container-runtime/config.toml"
    found = server(files={config: f"[nvidia-container-cli]\n{line}"})["toolkit"]
    if line.strip().startswith("no-cgroups"):
        assert found["verdict"] == "ok"
    else:
        assert found["verdict"] == "fail" and "no-cgroups --in-place" in found["remedy"]


@pytest.mark.parametrize(
    ("version", "verdict"), [("4.3.1", "ok"), ("5.4.0", "ok"), ("3.4.4", "fail")]
)
def test_podman_is_podman_and_no_old_docker(
    server: Callable, tmp_path: Path, version: str, verdict: str
) -> None:
    script(
        tmp_path / "bin",
        "podman",
        f"""case "$*" in --version) echo 'podman version {version}' ;;
        *Server.Version*) echo '{version}' ;; *GraphRoot*) echo / ;;
        *Rootless*) echo false ;; *) exit 125 ;; esac\n""",
    )
    found = server(files={"etc/cdi/nvidia.yaml": "cdiVersion: 0.6.0\n"})
    assert found["engine"]["measured"] == f"podman {version}"
    assert found["engine"]["verdict"] == verdict and "store" not in found
    assert found["toolkit"]["verdict"] == "ok"
    if verdict == "fail":
        assert found["engine"]["remedy"] == "update podman to 4.0 or newer"


def test_docker_from_snap_is_told_what_it_cannot_see(server: Callable, tmp_path: Path) -> None:
    docker_says(tmp_path / "bin", root="/var/snap/docker/common/var-lib-docker")
    assert "snap" not in server(), "the bundle is below the home folder here"
    found = server(HOME=str(tmp_path / "b"))["snap"]
    assert found["verdict"] == "fail" and str(tmp_path / "prefix") in found["measured"]


def test_no_right_to_the_socket_and_no_engine_are_two_things(
    server: Callable, tmp_path: Path
) -> None:
    words = "permission denied while trying to connect to the Docker daemon socket"
    script(tmp_path / "bin", "docker", f"echo '{words}' >&2\nexit 1\n")
    assert "usermod -aG docker" in server()["engine"]["remedy"]
    script(tmp_path / "bin", "docker", "echo 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    assert "systemctl start docker" in server()["engine"]["remedy"]
