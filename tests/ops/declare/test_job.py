"""A job as a program declares it: the same models as a job file, there and back."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import milktea
import rig
from ops.box.transfer import sha256_of
from ops.errors import ConfigError, PreflightError
from ops.fakevast import FakeVast
from ops.job import config
from ops.market.provider import Provider
from ops.wait import RealClock

ROOT = Path(__file__).parents[3]
PRACTICE = {
    "model": {"base": str(ROOT / "trainer/practice/practice_model"), "precision": "fp32"},
    "image": {"ref": "milktea/practice:3", "trainer": "image", "size_gib": 0.31},
    "gpu": (),
}


def example(name: str) -> Any:
    spec = spec_from_file_location(name, ROOT / f"jobs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vast(fake: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


@pytest.fixture
def declared(tmp_path: Path) -> Callable[..., milktea.Job]:
    def make(**more: Any) -> milktea.Job:
        given: dict[str, Any] = {"model": "org/base@main", "data": tmp_path / "rows.json"}
        given |= {"timeout": "6h", "max_usd": 3.0, **more}
        return milktea.Job("insurance", **given)

    return make


def test_a_job_is_the_file_that_it_writes(
    tmp_path: Path, declared: Callable[..., milktea.Job]
) -> None:
    job = declared(
        lora=milktea.Lora(r=8),
        training={"num_train_epochs": 2, "warmup_steps": None},
        gpu=["A100:2"],
        volume=milktea.Volume("insurance", tmp_path / "kept"),
    )
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/insurance.toml").write_text(job.to_toml())
    assert config.load(tmp_path / "jobs/insurance.toml") == job.file
    again = milktea.Job.from_toml(tmp_path / "jobs/insurance.toml")
    assert again.file == job.file and again.to_toml() == job.to_toml()
    assert job.file.results.folder == tmp_path / "kept" and job.file.limits.max_hours == 6
    assert (job.file.offer.gpu_name, job.file.offer.num_gpus) == (["A100"], 2)
    changed = again.with_(lora={"lora_alpha": 4}, timeout="30m", max_usd=1)
    assert (changed.file.lora.r, changed.file.lora.lora_alpha) == (8, 4)
    assert (changed.file.limits.max_hours, changed.file.limits.max_usd) == (0.5, 1)
    assert again.file == job.file, "with_ changes nothing of its own job"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_every_job_file_of_ours_goes_through_python_unchanged(path: Path, tmp_path: Path) -> None:
    if path.name == "reference.toml":
        return
    job = milktea.Job.from_toml(path)
    if job.file.stages:
        with pytest.raises(ConfigError, match="more than one job file"):
            job.to_toml()
        return
    assert config.parse(tomllib.loads(job.to_toml()), tmp_path / "j.toml") == job.file


def test_time_and_money_have_no_default(declared: Callable[..., milktea.Job]) -> None:
    with pytest.raises(TypeError, match=r"timeout.*max_usd"):
        milktea.Job("a", model="org/base", data="rows.json")  # type: ignore[call-arg]
    for wrong in ("6", "6 weeks", "", "-1h"):
        with pytest.raises(ConfigError, match="is no time"):
            declared(timeout=wrong)
    assert declared(timeout=timedelta(minutes=90)).file.limits.max_hours == 1.5


def test_every_mistake_is_told_with_its_key(declared: Callable[..., milktea.Job]) -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rat: unknown key; did you mean"):
        declared(training={"learning_rat": 1})
    with pytest.raises(ConfigError, match="gpu 'A100:0' is no card"):
        declared(gpu="A100:0")
    with pytest.raises(ConfigError, match='neither "vast" nor "here"'):
        declared().remote(where="cluster")


def test_of_several_counts_of_gpus_the_cheapest_finished_run_is_planned(
    own: rig.Rig, vast: milktea.Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILKTEA_RUNS", str(own.runs))
    base = rig.tiny_model(own.folder / "stub")
    rest: dict[str, Any] = {"model": {"base": str(base), "precision": "fp32"}, "timeout": "2h"}
    rest |= {"data": own.data, "max_usd": 1.0, "image": {"ref": rig.IMAGE, "trainer": "image"}}
    both = milktea.Job("tea", gpu=["RTX 4090", "RTX 4090:2"], **rest)
    assert [f.offer.num_gpus for f in both.files] == [1, 2]
    planned = both.plan(vast=vast)
    assert planned.plan.needs.num_gpus == 1
    one, *others = str(planned).splitlines()
    assert one.startswith("tea-") and "1.00 $ and 2.0 h" in one and "1 x RTX 4090" in others[0]
    with pytest.raises(ConfigError, match="more than one job file"):
        both.to_toml()
    swept = milktea.plan_map([both, both.with_(lora={"r": 8})], max_usd=1, vast=vast, root=own.runs)
    assert [t.settings for t in swept.trials] == [{"lora.r": 16}, {"lora.r": 8}]


def test_a_cluster_gets_the_exported_job_and_slurm_s_refusal_is_told(
    own: rig.Rig, declared: Callable[..., milktea.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(rig.tiny_model(own.folder / "stub"))
    given: dict[str, Any] = {"data": own.data, "model": {"base": base, "precision": "fp32"}}
    job = declared(**given, image={"ref": rig.IMAGE, "trainer": "image"})
    monkeypatch.setenv("PATH", str(own.folder / "bin"))
    with pytest.raises(PreflightError, match="no Slurm to hand the job to"):
        job.submit(own.folder / "shared")
    assert not (own.folder / "shared").exists()
    (own.folder / "bin").mkdir()
    slurm = "#!/bin/sh\n[ -e refuse ] && { echo 'no partition' >&2; exit 1; }\necho '42;tea'\n"
    (own.folder / "bin/sbatch").write_text(slurm)
    (own.folder / "bin/sbatch").chmod(0o755)
    queued = job.submit(own.folder / "shared", queue="gpu")
    assert (queued.number, queued.adapter) == ("42", None)
    assert "--partition=gpu" in (queued.folder / "train.sbatch").read_text()
    (queued.folder / "refuse").touch()
    with pytest.raises(PreflightError, match="sbatch refused: no partition"):
        job.submit(own.folder / "shared")


def test_a_spreadsheet_is_exported_as_the_rows_that_a_box_would_get(
    own: rig.Rig, declared: Callable[..., milktea.Job]
) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["instruction", "output"], ["why?", "because"], ["who?", "they"]):
        book.active.append(row)
    book.save(own.folder / "rows.xlsx")
    given: dict[str, Any] = {"model": {"base": str(rig.tiny_model(own.folder / "stub"))}}
    job = declared(**given, data=own.folder / "rows.xlsx", training={"batch_size": 2})
    written = job.export("slurm", own.folder / "out")
    [rows] = [path for path in written if path.match("*-slurm/data/*")]
    told = [json.loads(line) for line in gzip.decompress(rows.read_bytes()).split(b"\n") if line]
    assert [row["instruction"] for row in told] == ["why?", "who?"]
    packages = {"ref": "pytorch/pytorch:x", "packages": str(own.folder / "p.txt")}
    with pytest.raises(ConfigError, match="installed on a rented box only"):
        job.with_(image=packages).export("slurm", own.folder / "out")


@pytest.mark.parametrize("name", ["insurance", "gpt2_pb2e"])
def test_the_jobs_in_python_are_planned_on_the_practice_model(
    name: str, own: rig.Rig, vast: milktea.Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILKTEA_RUNS", str(own.runs))
    monkeypatch.chdir(own.folder)
    rows = json.loads((ROOT / "jobs/practice/train.json").read_text())[:40]
    (own.folder / "rows.json").write_text(json.dumps(rows))
    paths = [own.folder / "rows.json"]
    paths += [ROOT / "jobs/practice/held_out.json"] if name == "insurance" else [own.folder / "t"]
    job = example(name).job(*paths, **PRACTICE)
    planned = job.plan(vast=vast)
    assert 0 < planned.ranking.accepted[0].cost.usd < planned.plan.max_usd
    data = planned.plan.wire_job["data"]
    if name == "gpt2_pb2e":
        assert data["template"] == "pb2e" and data["template_text"].startswith("Praise B 2 Elon")
        assert planned.plan.wire_job["training"]["method"] == "full"
    assert Path(planned.plan.out) == own.folder / "volumes" / job.name.replace("_", "-")


def test_mounts_travel_by_their_hash_and_name_no_other_folder(
    own: rig.Rig,
    vast: milktea.Vast,
    declared: Callable[..., milktea.Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MILKTEA_RUNS", str(own.runs))
    (own.folder / "words.json").write_text("{}")
    base = str(rig.tiny_model(own.folder / "stub"))
    given: dict[str, Any] = {"data": own.data, "model": {"base": base, "precision": "fp32"}}
    given |= {"image": {"ref": rig.IMAGE, "trainer": "image"}, "max_usd": 1}
    job = declared(**given, mounts={"a/words.json": own.folder / "words.json"})
    planned = job.plan(vast=vast)
    [sent] = [p for p in planned.plan.pushes if p.remote.startswith("mounts/")]
    assert (sent.remote, sent.sha256) == ("mounts/a/words.json", sha256_of(sent.local))
    assert any("words.json (2 bytes)" in note for note in planned.plan.notes)
    for name in ("../job.json", "/etc/x", "a/../../b", "a//b", ".", "a/..", ""):
        with pytest.raises(ConfigError, match="is no plain name"):
            declared(mounts={name: own.data})
    with pytest.raises(PreflightError, match="is no file"):
        declared(**given, mounts={"x": own.folder / "gone"}).plan(vast=vast)


# -- the volume ------------------------------------------------------------------------------------


def test_what_goes_through_a_volume_is_compared_and_never_written_over(tmp_path: Path) -> None:
    volume = milktea.Volume("tea", tmp_path / "tea")
    (tmp_path / "rows.json").write_text("[1]")
    kept = volume.put(tmp_path / "rows.json", "data/rows.json")
    assert kept.read_text() == "[1]" and list(volume.files()) == ["data/rows.json"]
    before = volume.sha256()
    assert volume.put(tmp_path / "rows.json", "data/rows.json") == kept, "the same again is nothing"
    (tmp_path / "rows.json").write_text("[2]")
    with pytest.raises(PreflightError, match="is there and is another"):
        volume.put(tmp_path / "rows.json", "data/rows.json")
    assert volume.sha256() == before
    assert volume.get("data/rows.json", f"{tmp_path}/home/") == tmp_path / "home/rows.json"
    assert volume.get("data", tmp_path / "all") == tmp_path / "all"
    assert (tmp_path / "all/rows.json").read_text() == "[1]"
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["rows.json"]


def test_a_volume_deletes_what_is_named_and_nothing_outside_it(tmp_path: Path) -> None:
    volume = milktea.Volume("tea", tmp_path / "tea")
    (tmp_path / "mine.txt").write_text("mine")
    volume.put(tmp_path / "mine.txt", "a/b/mine.txt")
    with pytest.raises(PreflightError, match=r"recursive=True|is a folder"):
        volume.rm("a")
    for way_out in ("../mine.txt", "/etc/passwd", "a/../../mine.txt"):
        with pytest.raises(ConfigError, match="leads out of the volume"):
            volume.rm(way_out)
    with pytest.raises(ConfigError, match="volume itself"):
        volume.rm(".", recursive=True)
    volume.rm("a", recursive=True)
    assert volume.files() == {} and (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(PreflightError, match="has no a"):
        volume.rm("a")
    with pytest.raises(ConfigError, match="is no name of a volume"):
        milktea.Volume("../tea")
