"""Whether two trees of this project train to the same numbers, bit for bit, on the CPU.

    python bench/same_numbers.py TREE OTHER_TREE [--rows 320] [--only full]

The practice job runs in each tree, in forks of a process that has imported it: LoRA with dropout
and full, packed and padded, on one process and two (a full model is in parts then), straight
through, and stopped after its first step and resumed. A line for each: the last step and its loss,
the sha256 of the trained weights, and whether curves, weights, the other files of the adapter (but
for its README) and the held-out answers are equal. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]  # whose practice model and rows both trees get
STOPPED = 4
Case = tuple[str, bool, int, bool]  # method, packing, processes, resumed


def write_run(run: Path, rows: int, method: str, packing: bool) -> Path:
    """The practice job's run folder, with some of its rows; returns job.json."""
    (run / "data").mkdir(parents=True)
    (run / "model").symlink_to(HERE / "trainer/practice/practice_model")

    def put(name: str, count: int) -> dict[str, Any]:
        content = json.loads((HERE / "jobs/practice" / name).read_text(encoding="utf-8"))[:count]
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


def train(job: Path, processes: int) -> int:
    """Runs the job on that many forks of this process; returns the first one's exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_of, args=(job, r, processes, port)) for r in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(900)
    code = ranks[0].exitcode
    if code not in (0, STOPPED):
        raise RuntimeError(f"exit code {code}\n{(job.parent / 'log0.txt').read_text()[-3000:]}")
    return code


def rank_of(job: Path, rank: int, processes: int, port: int) -> None:
    """One process of a run, with what it says in a log of its own."""
    log = os.open(job.parent / f"log{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    from trainer.train import run_and_report

    sys.exit(run_and_report(job))


def deadline(job: Path, unix_s: float | None) -> None:
    """One that has passed stops the run after its next step, with a checkpoint."""
    told = json.loads(job.read_text()) | {"limits": {"deadline_unix_s": unix_s}}
    job.write_text(json.dumps(told))


def numbers(rows: int, case: Case) -> list[Any]:
    """The curve, the sha256 of the weights and of every file beside them, the held-out answers."""
    method, packing, processes, resumed = case
    with tempfile.TemporaryDirectory() as folder:
        job = write_run(Path(folder) / "run", rows, method, packing)
        if resumed:
            deadline(job, 1.0)
            assert train(job, processes) == STOPPED
            deadline(job, None)
        assert train(job, processes) == 0
        events = list(map(json.loads, (job.parent / "events.jsonl").read_text().splitlines()))
        outcomes = [e for e in events if e["event"] in ("sample", "score")]
        for event in outcomes:
            del event["t"]
        manifest = json.loads((job.parent / "result" / "manifest.json").read_text())
        files = {name: facts["sha256"] for name, facts in manifest["members"].items()}
        del files["README.md"]  # text, which names modules of the tree
        [weights] = [digest for name, digest in files.items() if name.endswith(".safetensors")]
        return [manifest["curve"], weights, files, outcomes]


def cases(only: str) -> Iterator[tuple[str, Case]]:
    for case in itertools.product(("lora", "full"), (True, False), (1, 2), (False, True)):
        method, packing, processes, resumed = case
        how = "resumed" if resumed else "straight"
        name = f"{method} {'packed' if packing else 'padded'} {processes} {how}"
        if only in name:
            yield name, case


def run_tree(tree: Path, rows: int, only: str) -> None:
    """Every case in this process's tree, a JSON line each."""
    import torch

    torch.set_num_threads(1)
    import trainer.train

    assert Path(trainer.train.__file__).is_relative_to(tree)
    for _, case in cases(only):
        print(json.dumps(numbers(rows, case)), flush=True)


def started(tree: Path, rows: int, only: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MILKTEA"))}
    environment |= {"PYTHONPATH": str(tree), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, str(tree), "--rows", str(rows), "--only", only]
    return subprocess.Popen(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="+", type=lambda p: Path(p).resolve())
    parser.add_argument("--rows", type=int, default=320, help="of the practice job's")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    given, wrong = parser.parse_args(), 0
    if len(given.trees) == 1:  # what this program starts for each of two
        run_tree(given.trees[0], given.rows, given.only)
        return 0
    trees = [started(tree, given.rows, given.only) for tree in given.trees]
    for name, _ in cases(given.only):
        one, other = (json.loads(tree.stdout.readline()) for tree in trees if tree.stdout)
        same = one == other
        wrong += not same
        verdict = "equal" if same else f"DIFFERENT: {other[0][-1]} {other[1][:16]}"
        print(f"{name:26} {one[0][-1]} {one[1][:16]} {verdict}", flush=True)
    return int(wrong > 0 or any(tree.wait() for tree in trees))


if __name__ == "__main__":
    sys.exit(main())
