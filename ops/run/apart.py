"""What a box sent is looked at in a process of its own, which has little memory, little time and
no secrets: an archive made to hang or to fill memory ends that process, and nothing else.

`python -m ops.run.apart` reads one request as JSON from its stdin and answers with one object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ops.errors import AdapterError
from ops.run import result
from ops.run.result import Expected, Verified
from trainer.wire import tensors
from trainer.wire.page import thinned

MAX_MEMORY = 2 << 30  # bytes of address space
START_S = 60.0  # to start Python and to look at a small archive, on a busy machine
BYTES_S = 20e6  # of a large one
MAX_FACTS = 1 << 20  # bytes of what a report shows
TOLD = ("steps", "final_loss", "versions", "kernels", "template")
HINT = "the box is a stranger's: rent another with `milktea rent-and-train`"


@dataclass(frozen=True)
class Looked:
    """A verified archive, and of its manifest what a report shows."""

    verified: Verified
    facts: dict[str, Any]


def listing(manifest: Path, names: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """sha256 and bytes of those of `names` that a manifest lists. Raises AdapterError."""
    answer = _asked({"manifest": str(manifest), "names": list(names)}, START_S)
    return {name: (str(sha256), int(size)) for name, (sha256, size) in answer["files"].items()}


def verify(manifest: Path, archive: Path, expect: Expected) -> Looked:
    """`ops.run.result.verify` of the files, within limits. Raises AdapterError."""
    request = {"manifest": str(manifest), "archive": str(archive), "expect": asdict(expect)}
    seconds = START_S + archive.stat().st_size / BYTES_S
    answer = _asked(request, seconds)
    return Looked(Verified(**answer["verified"]), answer["facts"])


def _asked(request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[2])
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT")}
    env = kept | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ops.run.apart"]
    given = json.dumps({**request, "seconds": seconds, "memory": MAX_MEMORY})
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            env=env,
            timeout=2 * seconds,
            start_new_session=True,  # Ctrl-C is the client's alone
        )
    except subprocess.TimeoutExpired as e:
        why = f"the result was not verified within {2 * seconds:.0f} s: no honest one takes so long"
        raise AdapterError(why, hint=HINT) from e
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as e:
        said = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        raise AdapterError(
            f"the result was not verified with {MAX_MEMORY >> 30} GiB and {seconds:.0f} s of a "
            f"processor: the process ended with {done.returncode}, {said[0][:200]}",
            hint=HINT,
        ) from e
    if "error" in answer:
        raise AdapterError(answer["error"], hint="`milktea resume RUN` fetches it again")
    return answer


# -- in the process of its own ---------------------------------------------------------------------


def _limit(seconds: float, memory: int) -> None:
    import resource

    whole = int(seconds) + 1
    limits = {resource.RLIMIT_CPU: whole, resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        with suppress(ValueError, OSError):  # macOS has no RLIMIT_AS: time is bounded all the same
            resource.setrlimit(kind, (most, most))


def _listed(request: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = result.as_wire_2(manifest)["files"]
    found = {}
    for name in request["names"]:
        if name in files:
            sha256, size = str(files[name]["sha256"]), files[name]["bytes"]
            if type(size) is not int or not 0 <= size < 1 << 50 or len(sha256) != 64:
                raise ValueError(f"{name} is listed with {size!r:.40} bytes")
            found[name] = (sha256, size)
    if result.ADAPTER not in found:
        raise ValueError(f"it lists no {result.ADAPTER}")
    return {"files": found}


def _verified(request: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    told = request["expect"]
    pairs = ("data_sha256", "target_modules")
    expect = Expected(**told | {k: tuple(told[k]) for k in pairs if told[k] is not None})
    verified = result.verify(Path(request["archive"]), manifest, expect)
    facts = {k: manifest[k] for k in TOLD if k in manifest}
    facts["curve"] = thinned(manifest.get("curve"))
    if len(json.dumps(facts)) > MAX_FACTS:
        facts = {"steps": manifest["steps"], "final_loss": manifest["final_loss"]}
    return {"verified": asdict(verified), "facts": facts}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        manifest = tensors.strict_json(Path(request["manifest"]).read_bytes())
        return (_verified if "archive" in request else _listed)(request, manifest)
    except AdapterError as e:
        return {"error": str(e)}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return {"error": f"manifest.json is not what a trainer writes: {e!r:.200}"}
    except MemoryError:
        return {"error": f"the result cannot be read with {request['memory']:,} bytes of memory"}


def main() -> None:
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["memory"])
    json.dump(_answer(request), sys.stdout)


if __name__ == "__main__":
    main()
