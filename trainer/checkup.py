"""Checks an image from inside: the locked versions, a real LoRA training, no attempt to reach a
network.

    python -m trainer.checkup [--lock FILE] [--expect-gpu]

JSON on stdout, what happens on stderr; exit 0 only if every check passed. With --expect-gpu no
visible GPU is a failure.

Made for ``docker run --network=none --read-only --tmpfs /tmp``; the lock is
/run/milktea/image.lock, or MILKTEA_LOCK. Connection attempts are counted by a Python audit hook in
this process and in all that it starts; where strace is in the image, also by it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 12
# What the hook writes to the file that MILKTEA_AUDIT names, one line an attempt. AF_UNIX sockets
# stay on the machine, and 127.0.0.1 is how the processes of several GPUs meet: no attempts.
HOOK = """
import os, sys
def _watch(event, args, out=os.environ.get("MILKTEA_AUDIT")):
    if event not in (
        "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"): return
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else "unix"
    else: host = args[0]
    if host in ("unix", None, "127.0.0.1", "::1", "localhost"): return
    with open(out, "a") as f: f.write(f"{event} {host!r}\\n")
if os.environ.get("MILKTEA_AUDIT"): sys.addaudithook(_watch)
"""


class CheckFailed(Exception):
    """A check that did not pass; the text says what was found and what was wanted."""


def versions_match_the_lock(lock: dict[str, Any] | None) -> str:
    """Every wheel of the lock is installed in exactly that version."""
    if lock is None:
        raise CheckFailed(
            "no lock to compare with: mount it at /run/milktea/image.lock, or set MILKTEA_LOCK"
        )
    wrong = []
    for wheel in lock.get("wheels", []):
        try:
            found = importlib.metadata.version(wheel["name"])
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wheel["version"]:
            wrong.append(f"{wheel['name']} {found} instead of {wheel['version']}")
    if wrong:
        raise CheckFailed(
            "; ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        )
    return f"{len(lock.get('wheels', []))} packages, all in the version of the lock"


def no_network_and_read_only() -> str:
    """Only the loopback interface exists, and the image cannot be written to."""
    found = sorted(p.name for p in Path("/sys/class/net").glob("*"))
    try:
        (Path(__file__).parent / ".write-test").touch()
        (Path(__file__).parent / ".write-test").unlink()
        writable = True
    except OSError:
        writable = False
    others = [
        name
        for name in found
        if name != "lo" and not name.startswith(("tunl", "sit", "gre", "ip6", "erspan", "ip_vti"))
    ]
    if others or writable:
        folder = "can be written" if writable else "cannot be written"
        raise CheckFailed(
            f"interfaces {', '.join(found)}; the trainer's folder {folder}: run with "
            "--network=none --read-only"
        )
    return f"interfaces: {', '.join(found) or 'none'}; image read-only"


def lower_precision() -> str:
    """The precision of two bytes that training has here: fp16 on a GPU without bf16, else bf16."""
    import torch

    from trainer.kernels.backend import is_old

    old = torch.cuda.is_available() and is_old(torch.device("cuda"))
    return "fp16" if old else "bf16"


def gpu_works(expected: bool) -> str:
    """Every visible GPU multiplies in two bytes, and this torch has code for its architecture.

    Raises CheckFailed where no GPU is visible and one is ``expected``.
    """
    import torch

    from trainer.kernels.backend import half

    if not torch.cuda.is_available():
        if not expected:
            return f"no GPU visible; torch {torch.__version__} on the CPU"
        driver = Path("/proc/driver/nvidia/version")
        raise CheckFailed(
            f"no GPU visible to torch {torch.__version__} (CUDA {torch.version.cuda}); the driver "
            + (
                f"is {driver.read_text().splitlines()[0]}"
                if driver.is_file()
                else "is not visible here"
            )
            + ": check nvidia-smi on the server, then the container toolkit (nvidia-ctk "
            "runtime configure, restart the engine); "
            "INSTALL.sh --gpus none installs on a server without GPUs"
        )
    works = []
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        dtype = half("bf16", device)
        x = torch.randn(256, 256, device=device, dtype=dtype)
        wrong = ((x @ x).float() - x.float() @ x.float()).abs().max().item()
        # bf16 keeps 8 bits: sums of 256 products of about 16 are right to about 0.1
        if not wrong < 2.0:
            raise CheckFailed(f"GPU {i} multiplies wrongly in {dtype}: off by {wrong:.3g}")
        works.append(
            f"{torch.cuda.get_device_name(i)} "
            f"(sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        )
    return (
        f"{', '.join(works)}; torch {torch.__version__} has code for "
        f"{' '.join(torch.cuda.get_arch_list())}"
    )


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add(x, y, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)
"""
TRITON_SINCE = (7, 5)  # the oldest architecture for which Triton's compiler has code


def triton_compiles(architectures: list[str]) -> str:
    """Triton makes machine code (a cubin) for each of the image's ``architectures`` ("8.6"); no GPU
    is needed for it."""
    if importlib.util.find_spec("triton") is None:
        return "not needed: no Triton in this image"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "selftest_kernel.py").write_text(KERNEL)
        spec = importlib.util.spec_from_file_location(
            "selftest_kernel", Path(folder) / "selftest_kernel.py"
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        import triton
        from triton.backends.compiler import GPUTarget

        signature = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "n": "i32", "SIZE": "constexpr"}
        source = triton.compiler.ASTSource(
            fn=module.add, signature=signature, constexprs={(4,): 1024}
        )
        sizes = []
        for architecture in architectures:
            major, minor = map(int, architecture.split("."))
            if (major, minor) < TRITON_SINCE:
                continue
            made = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32))
            if not made.asm.get("cubin"):
                raise CheckFailed(
                    f"Triton {triton.__version__} made no machine code for sm_{major}{minor}"
                )
            sizes.append(f"sm_{major}{minor}")
    return f"Triton {triton.__version__} makes machine code for {', '.join(sizes)}"


def compiler_for_triton() -> str:
    """Triton compiles a small C file for each kernel's launcher when it first runs."""
    if importlib.util.find_spec("triton") is None:
        return "not needed: no Triton in this image"
    compiler = (
        os.environ.get("CC")
        or shutil.which("cc")
        or shutil.which("gcc")
        or shutil.which("clang")
        or shutil.which("tcc")
    )
    if not compiler:
        raise CheckFailed("Triton is here, but no C compiler (cc, gcc, clang, tcc; or CC)")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "t.c"), Path(folder, "t.so")
        source.write_text(
            "#include <stdint.h>\n#include <stdlib.h>\nint64_t twice(int64_t x) { return 2 * x; }\n"
        )
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", str(built), str(source)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise CheckFailed(f"{compiler} does not compile: {done.stderr.strip()[:300]}")
        if ctypes.CDLL(str(built)).twice(21) != 42:
            raise CheckFailed(f"{compiler} compiles wrongly")
    return f"{compiler} compiles and links"


def bitsandbytes_library() -> str:
    """bitsandbytes has a library for the CUDA of this torch, and it loads."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.origin:
        return "not in this image: precision nf4 and int8 are not offered"
    import torch

    names = sorted(p.name for p in Path(spec.origin).parent.glob("libbitsandbytes_*"))
    if torch.version.cuda:
        major, minor = torch.version.cuda.split(".")[:2]
        usable = [
            n
            for n in names
            if (found := re.match(rf"libbitsandbytes_cuda{major}(\d+)\.", n))
            and int(found[1]) <= int(minor)
        ]
        if not usable:
            have = ", ".join(names) or "no library at all"
            raise CheckFailed(
                f"none of {have} is for CUDA {torch.version.cuda}: another bitsandbytes, or "
                "another CUDA line"
            )
        wanted = [usable[-1], *(n for n in names if "cpu" in n)]
    else:
        wanted = [n for n in names if "cpu" in n]
        if not wanted:
            raise CheckFailed(f"no CPU library among {', '.join(names) or 'no library at all'}")
    for name in wanted:
        try:
            ctypes.CDLL(str(Path(spec.origin).parent / name))
        except OSError as error:
            raise CheckFailed(f"{name} cannot be loaded: {error}") from error
    return f"{', '.join(wanted)} loaded beside torch {torch.__version__}"


def lora_learns(work: Path, environment: dict[str, str], precision: str) -> str:
    """Real steps of the real trainer on the model in the image: loss falls, gradients are not zero,
    the adapter is whole."""
    run = _write_run(work, precision)
    began = time.monotonic()
    command = [sys.executable, "-m", "trainer.launch", "job.json"]
    trace = work / f"strace-{precision}.txt"
    if _can_trace():
        command = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace), *command]
    done = subprocess.run(
        command,
        cwd=run,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise CheckFailed(f"the trainer ended with {done.returncode}: {done.stdout.strip()[-600:]}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    losses, norms = [e["loss"] for e in steps], [e["grad_norm"] for e in steps]
    # not every step has a line of its own
    taken = next((e["steps"] for e in events if e["event"] == "finished"), 0)
    if (
        taken != STEPS
        or len(steps) < 2
        or not losses[-1] < losses[0]
        or not all(n > 0 for n in norms)
    ):
        raise CheckFailed(
            f"{taken} steps of {STEPS}, loss {losses[:1]} to {losses[-1:]}, smallest "
            f"gradient norm {min(norms, default=0)}"
        )
    manifest = json.loads((run / "result" / "manifest.json").read_text("utf-8"))
    size = manifest["files"]["adapter.zip"]["bytes"]
    if (run / "result" / "adapter.zip").stat().st_size != size:
        raise CheckFailed("adapter.zip has another size than its manifest says")
    kernels = next((e.get("kernels") for e in events if e["event"] == "started"), None) or {}
    return (
        f"{taken} steps in {seconds:.1f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"gradient norm {min(norms):.3g} to {max(norms):.3g}, "
        f"adapter {size:,} bytes" + (f", kernels {kernels}" if kernels else "")
    )


def nothing_reached_out(audit: Path, traces: list[Path]) -> str:
    """0 attempts to connect or to resolve a name, by the audit hook and, where it is, by strace."""
    attempts = audit.read_text("utf-8").splitlines() if audit.exists() else []
    how = "audit hook"
    for trace in traces:
        how = "audit hook and strace"
        calls = [
            x
            for x in trace.read_text("utf-8", "replace").splitlines()
            if "connect(" in x and "AF_INET" in x
        ]
        attempts += [x for x in calls if "127.0.0.1" not in x and '"::1"' not in x]
    if attempts:
        raise CheckFailed(f"{len(attempts)} attempts: {'; '.join(attempts[:5])}")
    return f"0 attempts (by {how})"


def _can_trace() -> bool:
    if not shutil.which("strace"):
        return False
    return (
        subprocess.run(
            ["strace", "-qq", "-e", "trace=connect", "true"], capture_output=True
        ).returncode
        == 0
    )


def find_model() -> Path:
    """The practice model: beside the trainer, or in the image under /models. Raises CheckFailed
    where there is none."""
    folders = [
        Path(__file__).parent / "practice" / "practice_model",
        *sorted(Path("/models").glob("*practice*")),
    ]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise CheckFailed(f"no practice model to train: looked for {', '.join(map(str, folders))}")


def _write_run(work: Path, precision: str) -> Path:
    """A run folder with a few rows of the practice world and the practice model of the image."""
    from trainer.practice import world
    from trainer.wire.job import Job

    run = work / "milktea" / f"selftest-{precision}"
    (run / "data").mkdir(parents=True)
    rows, _ = world.practice_rows()
    content = json.dumps(rows[: 8 * STEPS], ensure_ascii=False).encode()
    (run / "data" / "rows.json").write_bytes(content)
    (run / "model").symlink_to(find_model())
    data = {
        "path": "data/rows.json",
        "name": "rows.json",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }
    job = Job.model_validate(
        {
            "run_id": run.name,
            "model": {"base": "practice_model", "path": "model", "precision": precision},
            "data": {"files": [data], "template": "alpaca", "max_length": 256},
            "training": {
                "max_steps": STEPS,
                "batch_size": 8,
                "learning_rate": 3e-3,
                "save_every_s": 3600,
                "report_to": [],
            },
        }
    )
    (run / "job.json").write_text(job.model_dump_json(), "utf-8")
    return run


def run_all(lock_path: Path | None, expect_gpu: bool = False) -> dict[str, Any]:
    """Every check, each run even if one before it failed. The report is what INSTALL.sh keeps and
    evidence.py shows."""
    lock = (
        tomllib.loads(lock_path.read_text("utf-8")) if lock_path and lock_path.is_file() else None
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "hook").mkdir()
        (work / "hook" / "sitecustomize.py").write_text(HOOK)
        audit = work / "audit.txt"
        os.environ["MILKTEA_AUDIT"] = str(audit)
        exec(HOOK, {})  # in this process too
        path = os.pathsep.join(
            filter(
                None,
                [
                    str(work / "hook"),
                    os.environ.get("PYTHONPATH", str(Path(__file__).parent.parent)),
                ],
            )
        )
        # one thread: so small a model spends its time waiting for others on a busy server
        environment = os.environ | {
            "PYTHONPATH": path,
            "MILKTEA_AUDIT": str(audit),
            "HOME": str(work),
            "OMP_NUM_THREADS": "1",
        }
        lower = lower_precision()
        checks: list[tuple[str, Callable[[], str]]] = [
            ("versions", lambda: versions_match_the_lock(lock)),
            ("isolation", no_network_and_read_only),
            ("gpu", lambda: gpu_works(expect_gpu)),
            ("c compiler", compiler_for_triton),
            (
                "triton",
                lambda: triton_compiles((lock or {}).get("cuda", {}).get("architectures", [])),
            ),
            ("bitsandbytes", bitsandbytes_library),
            ("lora training, fp32", lambda: lora_learns(work, environment, "fp32")),
            (f"lora training, {lower}", lambda: lora_learns(work, environment, lower)),
            ("connections", lambda: nothing_reached_out(audit, sorted(work.glob("strace-*.txt")))),
        ]
        results = [_result(name, check) for name, check in checks]
        del os.environ["MILKTEA_AUDIT"]
    return {
        "milktea_selftest": 1,
        "image": (lock or {}).get("image"),
        "ok": all(r["ok"] for r in results),
        "checks": results,
    }


def _result(name: str, check: Callable[[], str]) -> dict[str, Any]:
    print(f"self-test: {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        ok, found = True, check()
    except CheckFailed as error:
        ok, found = False, str(error)
    # a check that breaks is a check that failed: the report must name it, whatever it was
    except Exception as error:
        ok, found = False, f"{type(error).__name__}: {error}"
    if not ok:
        print(f"self-test: {name} FAILED: {found}", file=sys.stderr, flush=True)
    return {"check": name, "ok": ok, "found": found, "seconds": round(time.monotonic() - began, 2)}


def main(arguments: list[str]) -> int:
    expect_gpu = "--expect-gpu" in arguments
    rest = [word for word in arguments if word != "--expect-gpu"]
    if rest and not (rest[0] == "--lock" and len(rest) == 2):
        print(__doc__, file=sys.stderr)
        return 2
    lock = rest[1] if rest else os.environ.get("MILKTEA_LOCK", "/run/milktea/image.lock")
    report = run_all(Path(lock), expect_gpu)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
