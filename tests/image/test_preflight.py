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
        *words: str, smi: str = H100, code: int = 0, files: dict[str, str] | None = None
    ) -> dict[str, Any]:
        for name, text in {"proc/meminfo": "MemTotal: 65536000 kB\n", **(files or {})}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        if not (tmp_path / "bin/docker").exists() and not (tmp_path / "bin/podman").exists():
            docker_says(tmp_path / "bin")
        asked = f'echo "$*" >>{tmp_path}/asked\n'
        script(tmp_path / "bin", "nvidia-smi", f"{asked}cat <<'X'\n{smi}\nX\nexit {code}\n")
        if not (tmp_path / "jail").exists():
            jail(tmp_path / "jail")
        path = f"{tmp_path / 'bin'}:{tmp_path / 'jail'}"
        ran = install(
            tmp_path / "b", "preflight", "--facts", *words, path=path, MILKTEA_HOST_ROOT=str(root)
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
        ("Unable to determine the device handle: Unknown Error", 15, "nvidia-smi must list"),
    ],
    ids=["not-loaded", "mismatch", "no-device", "other"],
)
def test_a_driver_that_does_not_answer_is_no_old_gpu(
    server: Callable, said: str, code: int, remedy: str
) -> None:
    found = server(smi=said, code=code)
    assert found["driver"]["verdict"] == "fail" and said[:40] in found["driver"]["measured"]
    assert remedy in found["driver"]["remedy"] and "another GPU" not in found["driver"]["remedy"]
    assert "gpu 0" not in found


def test_only_the_chosen_gpus_are_judged(server: Callable, tmp_path: Path) -> None:
    assert server("--gpus", "0,2")["gpu 0"]["verdict"] == "ok"
    assert (tmp_path / "asked").read_text().startswith("--id=0,2 --query-gpu=")
    assert server("--gpus", "none")["driver"]["measured"] == "not needed"


def test_mig_asks_for_one_of_its_devices(server: Callable) -> None:
    enabled = H100.replace("Disabled", "Enabled")
    found = server(smi=enabled)
    assert found["mig 0"]["verdict"] == "warn" and "nvidia-smi -L" in found["mig 0"]["remedy"]
    assert "mig 0" not in server("--gpus", "MIG-1c2d", smi=enabled)


@pytest.mark.parametrize(
    ("version", "spec", "verdict", "remedy"),
    [
        ("28.5.2", True, "ok", "nothing"),
        ("24.0.7", True, "fail", "nvidia-ctk runtime configure"),
        ("28.5.2", False, "fail", "install nvidia-container-toolkit"),
    ],
    ids=["new", "old-engine", "neither"],
)
def test_cdi_is_enough_where_the_engine_reads_it(
    server: Callable, tmp_path: Path, version: str, spec: bool, verdict: str, remedy: str
) -> None:
    docker_says(tmp_path / "bin", version=version, runtimes='{"runc":{}}')
    found = server(files={"etc/cdi/nvidia.yaml": "cdiVersion: 0.6.0\n"} if spec else {})
    assert found["toolkit"]["verdict"] == verdict and remedy in found["toolkit"]["remedy"]


@pytest.mark.parametrize("line", ["no-cgroups = true\n", "#no-cgroups = false\n"])
def test_a_rootless_engine_needs_no_cgroups(server: Callable, tmp_path: Path, line: str) -> None:
    docker_says(tmp_path / "bin")
    docker = tmp_path / "bin/docker"
    answer = """*SecurityOptions*) echo '["name=seccomp","name=rootless"]' ;;"""
    docker.write_text(docker.read_text().replace('case "$*" in', f'case "$*" in {answer}', 1))
    config = "etc/nvidia-container-runtime/config.toml"
    found = server(files={config: f"[nvidia-container-cli]\n{line}"})["toolkit"]
    if line.startswith("no-cgroups"):
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


def test_no_right_to_the_socket_and_no_engine_are_two_things(
    server: Callable, tmp_path: Path
) -> None:
    words = "permission denied while trying to connect to the Docker daemon socket"
    script(tmp_path / "bin", "docker", f"echo '{words}' >&2\nexit 1\n")
    assert "usermod -aG docker" in server()["engine"]["remedy"]
    script(tmp_path / "bin", "docker", "echo 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    assert "systemctl start docker" in server()["engine"]["remedy"]
