"""The Python API as a user's program calls it, against the emulator."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import openpyxl
import pytest

import milktea
import rig
from ops.errors import BoxLeaked, ConfigError, JournalError, NoOffer, OverBudget
from ops.fakevast import FakeVast
from ops.market.provider import Provider
from ops.run.folders import project_folder, runs_folder
from ops.wait import RealClock
from trainer.wire import events


@pytest.fixture
def vast(fake: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


@pytest.fixture
def job(own: rig.Rig) -> dict[str, Any]:
    """A job as a program writes it."""
    return {
        "name": "api",
        "model": {"base": str(rig.tiny_model(own.folder / "stub")), "precision": "fp32"},
        "data": {"files": [str(own.data)]},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "limits": {"max_usd": 1.0, "max_hours": 2.0},
        "image": {"ref": rig.IMAGE, "trainer": "image", "size_gib": 0.4},
        "results": {"folder": str(own.folder / "out")},
    }


def test_a_plan_says_what_a_run_would_cost_and_leaves_nothing(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    planned = milktea.plan(job, vast=vast, root=own.runs)
    best, *others = planned.ranking.accepted
    assert 0 < best.cost.usd < 1 and all(best.cost.usd <= p.cost.usd + 0.01 for p in others)
    assert planned.credit_usd == vast.credit_usd()
    assert planned.plan.run_id.startswith("api-")
    assert list(own.runs.iterdir()) == [] and milktea.runs(own.runs) == []


def test_a_spreadsheet_is_trained_on_and_a_plan_that_is_dropped_leaves_nothing(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    book = openpyxl.Workbook()
    book.worksheets[0].append(["instruction", "output"])
    for n in range(20):
        book.worksheets[0].append([f"say {n}", n])
    book.save(own.folder / "rows.xlsx")
    job["data"]["files"] = [str(own.folder / "rows.xlsx")]
    planned = milktea.plan(job, vast=vast, root=own.runs)
    shutil.rmtree(own.image)
    rig.stub_image(own.image, planned.plan.wire_job["data"]["files"][0]["sha256"])
    run = milktea.rent_and_train(planned, vast=vast, root=own.runs)
    assert run.adapter is not None and run.adapter.is_file()
    kept = {run.folder}
    milktea.drop(planned, own.runs)
    assert set(own.runs.iterdir()) == kept and (run.folder / "converted").is_dir()
    for day in (0, 2):
        left = own.runs / milktea.plan(job, vast=vast, root=own.runs).plan.run_id
        os.utime(left, (time.time() - day * 86_400, time.time() - day * 86_400))
    other = milktea.plan(job, vast=vast, root=own.runs)
    assert not left.exists() and len(set(own.runs.iterdir()) - kept) == 2
    for folder in set(own.runs.iterdir()) - kept:
        milktea.drop(replace(other, plan=replace(other.plan, run_id=folder.name)), own.runs)
    assert set(own.runs.iterdir()) == kept
    with pytest.raises(NoOffer):
        milktea.plan(job | {"offer": {"max_usd_per_hour": 0.001}}, vast=vast, root=own.runs)
    assert set(own.runs.iterdir()) == kept


def test_a_run_comes_home_with_its_adapter_cost_and_events(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    planned = milktea.plan(job, vast=vast, root=own.runs)
    run = milktea.rent_and_train(planned, vast=vast, root=own.runs)
    assert run.adapter is not None and run.adapter.parent == own.folder / "out" / run.id
    assert run.id == planned.plan.run_id and run.folder == own.runs / run.id
    assert run.status().stage == "done" and run.ends_itself_at is None
    cost = run.cost()
    assert cost.max_usd == 1.0 and 0 <= cost.spent_usd < 0.1
    assert cost.predicted_usd == pytest.approx(planned.ranking.accepted[0].cost.usd)
    assert cost.billed_usd is not None and cost.billed_usd < 0.1
    steps = [e.step for e in run.events() if isinstance(e, events.Step)]
    assert steps and list(run.events()) == list(run.events(follow=True))
    assert any(line.startswith("from the command to the first step") for line in run.explain())


def test_the_screen_hears_of_every_stage_in_order(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    class Heard(milktea.Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.kinds: list[str] = []

        def line(self, line: milktea.Line) -> None:
            self.kinds.append(line.kind)

        def plan(self, *told: Any) -> None:
            self.kinds.append("plan")

    heard = Heard()
    milktea.rent_and_train(job, vast=vast, root=own.runs, screen=heard)
    wanted = ("plan", "planned", "rented", "pushed", "launched", "pulled", "destroyed", "bill")
    assert tuple(kind for kind in heard.kinds if kind in wanted) == wanted


def test_every_mistake_of_a_dict_is_told_with_its_path(job: dict[str, Any]) -> None:
    job["training"] = {"learning_rat": 1}
    job["limits"] = {"max_usd": "two"}
    with pytest.raises(ConfigError) as refused:
        milktea.load_job(job)
    assert "training.learning_rat: unknown key; did you mean" in str(refused.value)
    assert "limits.max_usd" in str(refused.value)


def test_the_results_of_a_dict_go_to_out_in_the_working_directory(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    del job["results"]
    assert milktea.load_job(job).results.folder == tmp_path / "out"


def test_a_signal_ends_a_run_in_order_and_the_handlers_come_back(
    own: rig.Rig, vast: milktea.Vast, fake: FakeVast, job: dict[str, Any]
) -> None:
    class Impatient(milktea.Quiet):
        def booting(self, *told: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(milktea.Interrupted, match="no box of this run is left; spent"):
        milktea.rent_and_train(job, vast=vast, root=own.runs, screen=Impatient(), foreground=True)
    assert fake.instances() == []
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    [run] = milktea.runs(own.runs)
    assert run.adapter is None and run.journal[-1].kind == "failed"


def test_an_interrupted_run_is_resumed_by_its_name(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    class Impatient(milktea.Quiet):
        def booting(self, *told: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(milktea.Interrupted):
        milktea.rent_and_train(job, vast=vast, root=own.runs, screen=Impatient(), foreground=True)
    run = milktea.resume("api", vast=vast, root=own.runs)
    assert run.adapter is not None and run.adapter.is_file()
    with pytest.raises(JournalError, match="is done: its adapter is"):
        milktea.resume(run, vast=vast, root=own.runs)
    assert milktea.destroy(run, vast=vast, root=own.runs) is False


def test_a_limit_below_what_the_run_will_cost_is_refused_by_the_plan(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    job["limits"]["max_usd"] = 1e-6
    with pytest.raises(NoOffer, match=r"limits\.max_usd .* would cost 0\.\d+ \$ on") as refused:
        milktea.plan(job, vast=vast, root=own.runs)
    assert "raise limits.max_usd" in refused.value.hint
    assert milktea.runs(own.runs) == []


def test_a_gpu_that_the_market_lacks_is_told_with_what_was_meant(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    job["offer"] = {"gpu_name": ["RTX 4O90"]}
    with pytest.raises(NoOffer, match=r"gpu_name .*is none of RTX 4O90; did you mean .*RTX 4090"):
        milktea.plan(job, vast=vast, root=own.runs)


def test_an_error_of_a_run_is_in_its_journal_with_its_exit_code(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    planned = milktea.plan(job, vast=vast, root=own.runs)
    poorer = replace(planned, plan=replace(planned.plan, max_usd=1e-6))
    with pytest.raises(OverBudget):
        milktea.rent_and_train(poorer, vast=vast, root=own.runs)
    [run] = milktea.runs(own.runs)
    assert run.journal[-1].kind == "failed" and run.journal[-1]["exit_code"] == 6


def test_the_last_run_is_the_one_that_began_last_whatever_its_name(own: rig.Rig) -> None:
    for name in ("a-20260102-000000-aaaa", "b-20260101-000000-bbbb", "a-20251231-000000-cccc"):
        (own.runs / name).mkdir()
        (own.runs / name / "journal.jsonl").write_text("")
    assert milktea.find_run("last", own.runs).id == "a-20260102-000000-aaaa"
    assert milktea.find_run("b", own.runs).id == "b-20260101-000000-bbbb"
    with pytest.raises(JournalError, match="'a' names 2 runs"):
        milktea.find_run("a", own.runs)


def test_a_destroy_that_cannot_be_proven_is_finished_by_the_next_call(
    own: rig.Rig,
    vast: milktea.Vast,
    fake: FakeVast,
    job: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ops.run.absence.DESTROY_PATIENCE_S", 100.0)
    fake.faults.add(where="destroy", what="ignored", times=None)
    with pytest.raises(BoxLeaked):
        milktea.rent_and_train(job, vast=vast, root=own.runs, foreground=True)
    with pytest.raises(BoxLeaked):
        milktea.plan(job, vast=vast, root=own.runs)
    fake.faults.clear()
    milktea.plan(job, vast=vast, root=own.runs)
    assert fake.instances() == []
    assert milktea.reap(vast=vast, root=own.runs).destroyed == []


def test_the_market_is_vast_ai_for_who_has_a_key() -> None:
    environ = {"VAST_API_KEY": "k", "VAST_URL": "http://127.0.0.1:9", "MILKTEA_PACE": "0.5"}
    vast = milktea.open_market(environ)
    assert vast.provider == Provider("http://127.0.0.1:9", "k") and vast.clock.pace == 0.5
    assert milktea.uses_vast_ai(environ) and not milktea.uses_vast_ai({"VAST_API_KEY": " "})


def test_a_command_typed_below_the_project_s_folder_finds_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project/jobs/more").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "project/jobs/more")
    assert runs_folder({}) == tmp_path / "project/jobs/more/runs", "no project yet"
    (tmp_path / "project/runs").mkdir()
    assert runs_folder({}) == tmp_path / "project/runs"
    assert project_folder() == tmp_path / "project"
    assert runs_folder({"MILKTEA_RUNS": str(tmp_path / "r")}) == tmp_path / "r"
    (tmp_path / "runs").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert runs_folder({}) == tmp_path / "other/runs", "the home itself is no project"
