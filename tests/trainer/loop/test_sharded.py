"""Full fine-tuning in parts over two processes on the CPU: the numbers, the checkpoints and the
result of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load as load_bytes
from tiny import adapter_sha256, events_of, manifest_of, rows, write_model

from trainer import memory
from trainer.loop import checkpoint
from trainer.loop.guards import Stopped
from trainer.loop.optim import EXTRA, optimizer_of
from trainer.loop.ranks import Ranks, StopSignal
from trainer.loop.replicas import Replicas
from trainer.loop.sharded import Shards
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.load import load
from trainer.model.parts import ModelError
from trainer.train import run_job
from trainer.wire.job import Job

Make = Callable[..., Path]
parts = pytest.mark.skipif(
    not hasattr(dcp, "HuggingFaceStorageWriter"),
    reason="this torch cannot write the checkpoints of parts: Shards refuses it",
)
FULL = {"method": "full", "learning_rate": 1e-3, "num_train_epochs": 2}


def start(job: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """`milktea-train job.json` on that many processes, as a box runs it."""
    changed = json.loads(job.read_text()) | {"processes": processes}
    job.write_text(json.dumps(changed))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.launch", str(job)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def train(job: Path, processes: int = 2) -> list[float]:
    done = start(job, processes)
    _, said = done.communicate(timeout=150)
    assert done.returncode == 0, said.decode()[-3000:]
    return [loss for _, loss in manifest_of(job)["curve"]]


def trained(job: Path) -> dict:
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        return load_bytes(archive.read("model.safetensors"))


@parts
@pytest.mark.slow
def test_two_processes_with_half_the_model_each_train_as_one_does(run_folder: Make) -> None:
    alone, shared = run_folder(training=FULL), run_folder(held_out=rows(2), training=FULL)
    assert run_job(alone) == 0
    one, two = [loss for _, loss in manifest_of(alone)["curve"]], train(shared)
    assert len(one) == 8 and one[-1] < one[0] - 0.3
    assert two == pytest.approx(one, abs=1e-5)
    expected, found = trained(alone), trained(shared)
    assert set(found) == set(expected)
    assert all((found[n] - expected[n]).abs().max() < 1e-4 for n in expected)
    assert next(e for e in events_of(shared) if e["event"] == "score")["rows"] == 2


def deadline(job: Path, unix_s: float | None) -> None:
    """A deadline that has passed stops a run after its next step, with a checkpoint and exit code
    4."""
    told = json.loads(job.read_text()) | {"limits": {"deadline_unix_s": unix_s}}
    job.write_text(json.dumps(told))


def copied(job: Path, name: str) -> Path:
    return shutil.copytree(job.parent, job.parent.parent / name, symlinks=True) / "job.json"


@parts
@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one_on_two_processes_and_on_one(
    run_folder: Make,
) -> None:
    whole, stopped = run_folder(training=FULL), run_folder(training=FULL)
    expected = train(whole)
    deadline(stopped, 1.0)
    process = start(stopped)
    _, said = process.communicate(timeout=150)
    assert process.returncode == 4 and b"deadline" in said, said.decode()[-3000:]
    folder = stopped.parent / "checkpoints" / "1"
    assert len(list(folder.glob("shard-*.safetensors"))) == 2 and checkpoint.whole(folder)
    deadline(stopped, None)
    alone = copied(stopped, "alone")
    assert train(stopped) == expected
    assert adapter_sha256(stopped) == adapter_sha256(whole)
    assert train(alone, processes=1) == pytest.approx(expected, abs=1e-5)
    assert [e["step"] for e in events_of(alone) if e["event"] == "started"] == [0, 1]


@parts
@pytest.mark.slow
def test_what_one_process_began_two_finish_and_sigterm_saves_on_both(run_folder: Make) -> None:
    long = FULL | {"num_train_epochs": 12}
    whole, handed = run_folder(training=long), run_folder(training=long)
    assert run_job(whole) == 0
    deadline(handed, 1.0)
    with pytest.raises(Stopped, match="deadline"):
        run_job(handed)
    deadline(handed, None)
    process = start(handed)
    while not any(e["event"] == "step" and e["step"] > 1 for e in events_of(handed)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 143, said.decode()[-3000:]
    newest = checkpoint.newest(handed.parent / "checkpoints")
    assert newest is not None and len(list(newest.glob("shard-*"))) == 2 and int(newest.name) > 1
    assert train(handed) == pytest.approx(
        [loss for _, loss in manifest_of(whole)["curve"]], abs=1e-4
    )
    assert [e["processes"] for e in events_of(handed) if e["event"] == "started"] == [1, 2, 2]


# -- one process that holds all the parts, in this one ---------------------------------------------


class Trio:
    """A model, its parameters by name, an optimizer, and the processes (one) that hold them."""

    def __init__(self, job: Job, folder: Path, in_parts: bool) -> None:
        device = torch.device("cpu")
        kind = Shards if in_parts else Replicas
        self.ranks: Ranks = kind(StopSignal(), device)
        self.model, _ = load(job, folder, device, TokenKeys(), shard=self.ranks.shard)
        self.ranks.place(self.model)
        self.named = dict(self.model.named_parameters())
        self.gradients = self.ranks.gradients(self.named.values(), EXTRA)
        self.optimizer = optimizer_of([list(self.named.values())], job.training, device)

    def step(self, micro: dict[str, Any]) -> tuple[float, float]:
        self.gradients.zero()
        loss = self.ranks.enter(target_loss, self.model, micro)
        loss.backward()
        norm = self.gradients.clip(1.0)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def save(self, root: Path, state: checkpoint.State) -> tuple[Path, str]:
        """The folder of the checkpoint, and the sha256 of its manifest."""
        told: list[tuple[int, Path, str]] = []
        written = lambda *what: told.append(what)  # noqa: E731
        self.ranks.save(root, self.named, self.optimizer, state, written)
        self.ranks.wait()
        [(step, folder, digest)] = told
        assert step == state.step
        return folder, digest

    def restore(self, folder: Path, fingerprint: str) -> checkpoint.State:
        return self.ranks.restore(folder, self.named, self.optimizer, fingerprint)


@pytest.fixture
def micro() -> dict[str, Any]:
    ids, positions = (
        torch.arange(40)[None] % 300,
        torch.cat([torch.arange(25), torch.arange(15)])[None],
    )
    labels = torch.where(torch.arange(40)[None] % 3 == 0, ids.roll(-1, 1), -100)
    ends = torch.tensor([0, 25, 40], dtype=torch.int32)
    cut = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 25, "max_length_k": 25}
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "targets_at": torch.nonzero(labels[0] != -100)[:, 0],
    } | cut


@parts
@pytest.mark.parametrize("kind", ["gqa", "qwen2", "gpt2"])
def test_parts_compute_what_the_whole_computes_for_each_kind_of_model(
    run_folder: Make, models: Callable[..., Path], alone: None, micro: dict[str, Any], kind: str
) -> None:
    job = Job.model_validate_json(run_folder(kind, training=FULL).read_bytes())
    whole, parts = Trio(job, models(kind), False), Trio(job, models(kind), True)
    for _ in range(3):
        assert parts.step(micro) == pytest.approx(whole.step(micro), rel=1e-5)
    assert list(parts.named) == list(whole.named)
    # softmax does not feel these: AdamW makes steps of rounding errors
    keys = ("k_proj.bias", "c_attn.bias")
    felt = [n for n in whole.named if not n.endswith(keys)]
    assert all(
        torch.allclose(parts.named[n].full_tensor(), whole.named[n], atol=1e-6) for n in felt
    )
    gathered = parts.ranks.whole(job, models(kind), on_device=True)
    assert gathered is not None and type(gathered) is type(whole.model)


@parts
def test_a_checkpoint_in_parts_and_one_in_a_file_are_read_by_either(
    run_folder: Make,
    models: Callable[..., Path],
    alone: None,
    micro: dict[str, Any],
    tmp_path: Path,
) -> None:
    job = Job.model_validate_json(run_folder(training=FULL).read_bytes())
    parts, whole = Trio(job, models(), True), Trio(job, models(), False)
    before, _ = parts.step(micro), whole.step(micro)
    kept = {"mean": torch.tensor([0.5, 2.0]), "seen": torch.arange(3)}
    state = checkpoint.State(1, "same", [[1, before[0]]], kept)
    folder, digest = parts.save(tmp_path / "parts", state)
    assert checkpoint.whole(folder) and parts.save(tmp_path / "parts", state) == (folder, digest)
    single, _ = whole.save(tmp_path / "file", state)
    expected = parts.step(micro)

    for source in (folder, single):
        for in_parts in (False, True):
            found = Trio(job, models(), in_parts)
            read = found.restore(source, "same")
            assert (read.step, read.curve) == (state.step, state.curve)
            assert all(torch.equal(read.stage[k], v) for k, v in kept.items())
            assert found.step(micro) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to another job"):
        parts.restore(folder, "other")


@parts
def test_tied_embeddings_stay_one_parameter(
    run_folder: Make, tmp_path: Path, alone: None, micro: dict[str, Any]
) -> None:
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    job = Job.model_validate_json(run_folder(training=FULL).read_bytes())
    whole, parts = Trio(job, tmp_path / "tied", False), Trio(job, tmp_path / "tied", True)
    assert "lm_head.weight" not in parts.named
    for _ in range(2):
        assert parts.step(micro) == pytest.approx(whole.step(micro), rel=1e-5)


def test_the_memory_oracle_shares_a_model_in_parts_and_an_adapter_not() -> None:
    shape = memory.Shape(
        hidden=4096, layers=32, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
    )
    one, eight = (
        memory.predict(shape, "bf16", method="full", tokens_per_micro_batch=2048, processes=n)
        for n in (1, 8)
    )
    states = 16 * memory.parameters(shape) / 2**30
    assert one.peak_gib > states > 100 and states / 8 < eight.peak_gib < one.peak_gib / 2
    assert memory.solve(shape, 80.0, "bf16", method="full") is None
    assert memory.solve(shape, 80.0, "bf16", method="full", processes=8) is not None
    adapters = [memory.predict(shape, "bf16", processes=n).peak_gib for n in (2, 8)]
    assert adapters[0] == adapters[1]


def test_a_torch_that_cannot_write_parts_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(dcp, "HuggingFaceStorageWriter", raising=False)
    with pytest.raises(ModelError, match=r"torch 2\..*over several processes.*2\.11 or newer"):
        Shards(StopSignal(), torch.device("cpu"))
