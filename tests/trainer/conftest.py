"""Models made once a session and run folders to train them in. Everything lives under the tests'
own folders."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import rows, write_model

from trainer.wire.chain import FILES, weights_sha256

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """models("gqa") -> the folder of a tiny random model, made once a session."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(kind: str = "gqa") -> Path:
        if kind not in made:
            write_model(root / kind, kind)
            made[kind] = root / kind
        return made[kind]

    return get


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run_folder(tmp_path: Path, models: Callable[..., Path]) -> Callable[..., Path]:
    """run_folder(kind="gqa", data=[...], held_out=[...], **job keys) -> job.json of a new run
    folder. Dicts merge into the defaults. `start` and `judge` are job.json of finished runs whose
    adapters the job gets, or folders of adapters, `how` the first one is taken up."""
    count = 0

    def make(
        kind: str = "gqa",
        data: list[Any] | None = None,
        held_out: list[Any] | None = None,
        model: Path | None = None,
        start: Path | None = None,
        judge: Path | None = None,
        how: str = "continue",
        **changes: Any,
    ) -> Path:
        nonlocal count
        count += 1
        run = tmp_path / f"run{count}"
        (run / "data").mkdir(parents=True)
        (run / "model").symlink_to(model or models(kind))

        def put(name: str, content: list[Any]) -> dict[str, Any]:
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n"
            (run / "data" / name).write_text(text, encoding="utf-8")
            return {
                "path": f"data/{name}",
                "name": name,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "size_bytes": len(text.encode()),
            }

        job: dict[str, Any] = {
            "run_id": "test-run",
            "model": {"base": "tiny/random", "path": "model", "precision": "fp32"},
            "data": {
                "files": [put("train.jsonl", rows() if data is None else data)],
                "max_length": 512,
            },
            "lora": {"r": 4, "lora_alpha": 8},
            "training": {
                "batch_size": 6,
                "learning_rate": 5e-3,
                "num_train_epochs": 2,
                "warmup_ratio": 0.0,
                "save_every_s": 1000,
            },
        }
        if held_out is not None:
            job["data"]["held_out"] = put("held_out.jsonl", held_out)
        if start is not None:
            job["start"] = put_adapter(start, run, "start") | {"how": how}
        if judge is not None:
            job["judge"] = put_adapter(judge, run, "judge")
        for key, value in changes.items():
            job[key] = {**job.get(key, {}), **value} if isinstance(value, dict) else value
        (run / "job.json").write_text(json.dumps(job))
        return run / "job.json"

    return make


def put_adapter(job: Path, run: Path, name: str) -> dict[str, Any]:
    """Unpacks a finished run's adapter into run/name, or links to a folder; what a job says of
    it."""
    if job.is_dir():
        (run / name).symlink_to(job)
        return {"path": name, "name": job.name, "sha256": weights_sha256(job)}
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        for file in FILES:
            archive.extract(file, run / name)
    return {"path": name, "name": job.parent.name, "sha256": weights_sha256(run / name)}
