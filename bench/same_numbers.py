"""Whether two trees of this project train to the same numbers, bit for bit, on the CPU.

    python bench/same_numbers.py TREE OTHER_TREE [--rows 320] [--only full]

The practice job runs in each tree (`python -m trainer.train`, no launcher): LoRA with dropout and
full, packed and padded, on one process and two (a full model is in parts then), straight through
and stopped after its first step and resumed. A line for each: the steps, the last loss, the
adapter's sha256, and whether the curves and the adapters are equal. Exit code 1 where one is not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STOPPED = 4


def write_run(tree: Path, run: Path, rows: int, method: str, packing: bool) -> Path:
    """The practice job's run folder, with some of its rows; returns job.json."""
    (run / "data").mkdir(parents=True)
    models = [tree / name for name in ("trainer/practice/pretrained", "trainer/practice/model")]
    (run / "model").symlink_to(next(path for path in models if path.is_dir()))

    def put(name: str, count: int) -> dict[str, Any]:
        content = json.loads((tree / "jobs/practice" / name).read_text(encoding="utf-8"))[:count]
        data = json.dumps(content, ensure_ascii=False).encode()
        (run / "data" / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return {"path": f"data/{name}", "name": name, "sha256": digest, "size_bytes": len(data)}

    data = {"files": [put("train.json", rows)], "held_out": put("held_out.json", 8)}
    training = {"method": method, "packing": packing, "batch_size": 32, "save_every_s": 2.0}
    job = {
        "run_id": "same-numbers",
        "model": {"base": "practice_model", "path": "model", "precision": "fp32"},
        "data": data | {"template": "alpaca", "max_length": 128},
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1 if method == "lora" else 0.0},
        "training": training | {"learning_rate": 3e-3 if method == "lora" else 3e-4},
    }
    (run / "job.json").write_text(json.dumps(job))
    return run / "job.json"


def train(tree: Path, job: Path, processes: int) -> int:
    """Runs the job on that many processes; returns the first one's exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MILKTEA"))}
    kept |= {"PYTHONPATH": str(tree), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command, ranks = [sys.executable, "-m", "trainer.train", str(job)], []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        told = {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        with open(job.parent / f"log{rank}.txt", "ab") as log:
            environment = kept | (told if processes > 1 else {})
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=job.parent)
            )
    codes = [rank.wait(600) for rank in ranks]
    if codes[0] not in (0, STOPPED):
        raise RuntimeError(f"{tree.name}: {codes}\n{(job.parent / 'log0.txt').read_text()[-3000:]}")
    return codes[0]


def deadline(job: Path, unix_s: float | None) -> None:
    """One that has passed stops the run after its next step, with a checkpoint."""
    job.write_text(json.dumps(json.loads(job.read_text()) | {"deadline_unix_s": unix_s}))


def numbers(tree: Path, rows: int, case: tuple[str, bool, int, bool]) -> tuple[list[Any], str, str]:
    """(curve, the adapter's sha256, what the events told of held-out answers) of one run."""
    method, packing, processes, resumed = case
    with tempfile.TemporaryDirectory() as folder:
        job = write_run(tree, Path(folder) / "run", rows, method, packing)
        if resumed:
            deadline(job, 1.0)
            assert train(tree, job, processes) == STOPPED
            deadline(job, None)
        assert train(tree, job, processes) == 0
        events = map(json.loads, (job.parent / "events.jsonl").read_text().splitlines())
        told = [
            {k: v for k, v in e.items() if k != "t"}
            for e in events
            if e["event"] in ("sample", "score")
        ]
        manifest = json.loads((job.parent / "result" / "manifest.json").read_text())
        return manifest["curve"], manifest["adapter_sha256"], json.dumps(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs=2, type=lambda p: Path(p).resolve())
    parser.add_argument("--rows", type=int, default=320, help="of the practice job's")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    given, wrong = parser.parse_args(), 0
    for case in itertools.product(("lora", "full"), (True, False), (1, 2), (False, True)):
        method, packing, processes, resumed = case
        how = "resumed" if resumed else "straight"
        name = f"{method} {'packed' if packing else 'padded'} {processes} {how}"
        if given.only not in name:
            continue
        one, other = (numbers(tree, given.rows, case) for tree in given.trees)
        same = one == other
        wrong += not same
        verdict = "equal" if same else f"DIFFERENT: {other[0][-1]} {other[1][:16]}"
        print(f"{name:26} {one[0][-1]} {one[1][:16]} {verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
