"""The image's self-test: each check passes where it should, and fails by name where it should."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import checkup


def test_versions_are_compared_with_the_lock_package_by_package() -> None:
    version = importlib.metadata.version("pydantic")
    lock = {"wheels": [{"name": "pydantic", "version": version}]}
    assert checkup.versions_match_the_lock(lock).startswith("1 packages")
    lock["wheels"] += [{"name": "numpy", "version": "0.0.1"}, {"name": "not-there", "version": "1"}]
    with pytest.raises(
        checkup.CheckFailed, match=r"numpy .* instead of 0\.0\.1; not-there missing instead of 1"
    ):
        checkup.versions_match_the_lock(lock)
    with pytest.raises(checkup.CheckFailed, match="no lock"):
        checkup.versions_match_the_lock(None)


def attempts(tmp_path: Path, program: str) -> list[str]:
    """What the hook saw of a Python program and of what it starts."""
    (tmp_path / "sitecustomize.py").write_text(checkup.HOOK)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "MILKTEA_AUDIT": str(tmp_path / "audit.txt"),
    }
    subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=60
    )
    audit = tmp_path / "audit.txt"
    return audit.read_text().splitlines() if audit.exists() else []


@pytest.mark.parametrize(
    "program",
    [
        "import socket; s = socket.socket(); s.settimeout(0.01); s.connect(('203.0.113.7', 443))",
        "import socket; socket.getaddrinfo('hub.invalid', 443)",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('203.0.113.7', 53))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import socket; "
        "socket.getaddrinfo('hub.invalid', 443)\"])",
        "import urllib.request; urllib.request.urlopen('http://hub.invalid')",
    ],
)
def test_an_attempt_to_reach_out_is_counted_wherever_it_happens(
    tmp_path: Path, program: str
) -> None:
    found = attempts(tmp_path, program)
    assert len(found) >= 1
    with pytest.raises(checkup.CheckFailed, match="attempts: socket"):
        checkup.nothing_reached_out(tmp_path / "audit.txt", [])


def test_processes_that_meet_on_loopback_reach_nothing(tmp_path: Path) -> None:
    program = (
        "import socket; l = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(l.getsockname());"
        "a, b = socket.socketpair(); socket.getaddrinfo('localhost', 80)"
    )
    assert attempts(tmp_path, program) == []
    assert "0 attempts" in checkup.nothing_reached_out(tmp_path / "audit.txt", [])


def test_strace_counts_what_python_does_not_see(tmp_path: Path) -> None:
    trace = tmp_path / "strace.txt"
    quiet = (
        '7 connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0\n7 connect(4, '
        '{sa_family=AF_INET, sin_addr=inet_addr("127.0.0.1")}, 16) = 0\n'
    )
    trace.write_text(quiet)
    assert (
        checkup.nothing_reached_out(tmp_path / "absent", [trace])
        == "0 attempts (by audit hook and strace)"
    )
    trace.write_text(
        quiet + "8 connect(4, {sa_family=AF_INET, sin_port=htons(443), "
        'sin_addr=inet_addr("203.0.113.7")}, 16) = -1\n'
    )
    with pytest.raises(checkup.CheckFailed, match=r"1 attempts: 8 connect.*203\.0\.113\.7"):
        checkup.nothing_reached_out(tmp_path / "absent", [trace])


def test_the_compiler_for_triton_is_really_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if shutil.which("cc") or shutil.which("gcc"):
        assert checkup.compiler_for_triton().endswith("compiles and links")
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(checkup.CheckFailed, match="/bin/false does not compile"):
        checkup.compiler_for_triton()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(checkup.CheckFailed, match="no C compiler"):
        checkup.compiler_for_triton()


def test_a_bitsandbytes_without_a_library_for_this_cuda_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "libbitsandbytes_cuda117.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    # another test may have loaded the real one
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        checkup.CheckFailed, match=r"none of libbitsandbytes_cuda117\.so is for CUDA 13\.0"
    ):
        checkup.bitsandbytes_library()
    (package / "libbitsandbytes_cuda130.so").touch()
    with pytest.raises(checkup.CheckFailed, match=r"libbitsandbytes_cuda130\.so cannot be loaded"):
        checkup.bitsandbytes_library()
    spec = importlib.util.find_spec("_ctypes")
    assert spec and spec.origin, "any library that loads will do"
    shutil.copy(spec.origin, package / "libbitsandbytes_cuda130.so")
    assert checkup.bitsandbytes_library().startswith(
        "libbitsandbytes_cuda130.so loaded beside torch"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(checkup.CheckFailed, match="no CPU library"):
        checkup.bitsandbytes_library()


def test_a_check_that_breaks_counts_as_failed_and_the_others_still_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def breaks() -> str:
        raise ZeroDivisionError("division by zero")

    result = checkup._result("odd", breaks)
    assert (result["ok"], result["found"]) == (False, "ZeroDivisionError: division by zero")
    assert "self-test: odd FAILED" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_self_test_trains_counts_no_attempt_and_says_that_this_is_no_container(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.checkup", "--lock", str(tmp_path / "none.lock")],
        capture_output=True,
        text=True,
        cwd=Path(checkup.__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    import json

    found = {c["check"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert not found["versions"]["ok"] and not found["isolation"]["ok"]
    assert found["lora training"]["ok"], found["lora training"]["found"]
    assert found["connections"]["ok"] and found["c compiler"]["ok"] and found["bitsandbytes"]["ok"]


def test_no_gpu_is_a_failure_with_its_remedy_where_one_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkup.gpu_works(expected=False).startswith("no GPU visible; torch")
    with pytest.raises(
        checkup.CheckFailed,
        match=r"no GPU visible to torch .*nvidia-ctk runtime configure.*--gpus none",
    ):
        checkup.gpu_works(expected=True)


def test_an_image_without_triton_needs_no_machine_code_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert checkup.triton_compiles(["8.0"]) == "not needed: no Triton in this image"


def test_an_option_that_is_not_known_is_answered_with_the_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert checkup.main(["--expect-gpus"]) == 2
    assert "--expect-gpu" in capsys.readouterr().err
