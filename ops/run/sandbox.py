"""Verify what a box sent in a process of its own, with limits on memory and time and without
secrets: an archive made to hang or to fill the memory ends that process and nothing else.

`python -m ops.run.sandbox` reads one request as JSON from its stdin and answers with one object.
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
from ops.run import merged_result, result
from ops.run.expected import ADAPTER, ExpectedResult, Invalid
from ops.run.result import Verified
from trainer.wire import tensors
from trainer.wire.page import thinned

MAX_MEMORY = 2 << 30  # bytes of address space
START_S = 60.0  # to start Python and to verify a small archive, on a busy machine
BYTES_S = 20e6  # bytes a second of a large archive
MAX_FACTS = 1 << 20  # bytes of facts for a report
REPORTED = ("steps", "final_loss", "versions", "kernels", "template", "held_out")
HINT = "the box is a stranger's: rent another with `milktea rent-and-train`"


@dataclass(frozen=True)
class Inspected:
    """A verified archive, and the facts of its manifest that a report shows."""

    verified: Verified
    facts: dict[str, Any]


def listing(manifest: Path, names: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """(sha256, bytes) of each of `names` that a manifest lists. Raises AdapterError."""
    answer = _run({"manifest": str(manifest), "names": list(names)}, START_S)
    return {name: (str(sha256), int(size)) for name, (sha256, size) in answer["files"].items()}


def verify(manifest: Path, archive: Path, expect: ExpectedResult) -> Inspected:
    """`ops.run.result.verify` of the files, within limits. Raises AdapterError."""
    request = {"manifest": str(manifest), "archive": str(archive), "expect": asdict(expect)}
    seconds = START_S + archive.stat().st_size / BYTES_S
    answer = _run(request, seconds)
    return Inspected(Verified(**answer["verified"]), answer["facts"])


def merged_listing(certificate: Path, manifest: Path) -> dict[str, Any]:
    """ "files" ((sha256, bytes) by name) and "numbers" of a merged model's certificate, beside the
    manifest of the verified adapter that it was made of. Raises AdapterError."""
    told = {"certificate": str(certificate), "manifest": str(manifest)}
    return _run(told, START_S)


def verify_merged(folder: Path, size_bytes: int) -> dict[str, Any]:
    """`ops.run.merged_result.verify` of a folder of so many bytes, within limits. Raises
    AdapterError."""
    return _run({"merged": str(folder)}, START_S + size_bytes / BYTES_S)


def _run(request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of the process, which gets `seconds` of a processor. Raises AdapterError."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = {
        k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT")
    }
    env = inherited | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ops.run.sandbox"]
    text = json.dumps({**request, "seconds": seconds, "memory": MAX_MEMORY})
    try:
        done = subprocess.run(
            command,
            input=text,
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
        last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        raise AdapterError(
            f"the result was not verified with {MAX_MEMORY >> 30} GiB and {seconds:.0f} s of a "
            f"processor: the process ended with {done.returncode}, {last[0][:200]}",
            hint=HINT,
        ) from e
    if "error" in answer:
        raise AdapterError(answer["error"], hint="`milktea resume RUN` fetches it again")
    return answer


# -- in the process of its own ---------------------------------------------------------------------


def _limit(seconds: float, memory: int) -> None:
    import resource

    cpu_s = int(seconds) + 1
    limits = {resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        with suppress(ValueError, OSError):  # macOS has no RLIMIT_AS: time is bounded all the same
            resource.setrlimit(kind, (limit, limit))


def _listed(request: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = result.as_wire_2(manifest)["files"]
    found = {}
    for name in request["names"]:
        if name in files:
            sha256, size = str(files[name]["sha256"]), files[name]["bytes"]
            if type(size) is not int or not 0 <= size < 1 << 50 or len(sha256) != 64:
                raise ValueError(f"{name} is listed with {size!r:.40} bytes")
            found[name] = (sha256, size)
    if ADAPTER not in found:
        raise ValueError(f"it lists no {ADAPTER}")
    return {"files": found}


def _verified(request: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    expect = request["expect"]
    pairs = ("data_sha256", "target_modules")
    expect = ExpectedResult(
        **expect | {k: tuple(expect[k]) for k in pairs if expect[k] is not None}
    )
    verified = result.verify(Path(request["archive"]), manifest, expect)
    facts = {k: manifest[k] for k in REPORTED if k in manifest}
    facts["curve"] = thinned(manifest.get("curve"))
    facts["held_out_curve"] = manifest.get("held_out_curve")
    if len(json.dumps(facts)) > MAX_FACTS:
        facts = {"steps": manifest["steps"], "final_loss": manifest["final_loss"]}
    return {"verified": asdict(verified), "facts": facts}


def _merged(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of what concerns a merged model."""
    try:
        if "merged" in request:
            return dict(merged_result.verify(Path(request["merged"])))
        told, manifest = (
            tensors.strict_json(Path(request[name]).read_bytes())
            for name in ("certificate", "manifest")
        )
        return merged_result.listed(told, result.as_wire_2(manifest)["members"])
    except Invalid as defect:
        return {"error": str(defect)}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return {"error": f"the merged model is not what a trainer writes: {error!r:.200}"}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if "merged" in request or "certificate" in request:
            return _merged(request)
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
