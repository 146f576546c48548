"""A box whose programs lie: what it sends is left there, bounded, or made anew at home."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import AdapterError, Failed, PreflightError
from ops.fakevast import FakeVast
from ops.run import retrieve, retry
from ops.run.session import Detached

EVIL = b"<script>location='http://evil.example'</script>"


def add(own: rig.Rig, files: dict[str, bytes], **facts: Any) -> None:
    """Files beside the result, listed in its manifest."""
    result = own.image / "result"
    for name, content in files.items():
        (result / name).write_bytes(content)
    manifest = json.loads((result / "manifest.json").read_text())
    manifest["files"] |= rig.listed(files)
    (result / "manifest.json").write_text(json.dumps(manifest | facts))


def test_only_the_adapter_and_the_picture_come_home_and_the_report_is_made_here(
    own: rig.Rig, fake: FakeVast
) -> None:
    add(
        own,
        {
            "report.html": EVIL,
            "sitecustomize.py": b"import os",
            "Makefile": b"all:\n",
            "adapter_model.bin": b"\x80\x04.",
            "-rf": b"",
        },
        kernels={EVIL.decode(): EVIL.decode()},
        versions={"torch": EVIL.decode()},
    )
    outcome, _, _ = rig.whole_run(own, fake)
    folder = outcome.adapter_zip.parent
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.zip", "loss.png", "report.html"]
    report = (folder / "report.html").read_text()
    assert "<script" not in report and "&lt;script&gt;" in report and "<polyline" in report
    assert "$/h" in report and "default-src 'none'" in report
    kept = {p.name for p in (own.runs / outcome.adapter_zip.parent.name / "result").iterdir()}
    assert kept == {"manifest.json", "adapter.zip", "loss.png"}


def test_a_picture_that_is_none_is_left_out(own: rig.Rig, fake: FakeVast) -> None:
    add(own, {"loss.png": EVIL})
    outcome, _, _ = rig.whole_run(own, fake)
    assert not (outcome.adapter_zip.parent / "loss.png").exists()


def test_an_archive_larger_than_the_job_can_have_made_is_not_fetched(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "SLACK_BYTES", 1000)
    outcome, _, _ = rig.whole_run(own, fake)
    assert isinstance(outcome, AdapterError)
    assert "this job can have made at most 1,000" in str(outcome)
    assert not list((own.folder / "out").glob("*/adapter.zip"))
    assert not list(own.runs.glob("*/result/adapter.zip*")), "not a byte of it"


def test_a_manifest_without_end_is_not_fetched(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "MANIFEST_BYTES", 100)
    outcome, _, _ = rig.whole_run(own, fake)
    assert isinstance(outcome, AdapterError) and "no more than 100" in str(outcome)


@pytest.mark.parametrize(
    "files",
    [
        {"state.bin": {"sha256": "0" * 64, "bytes": 1 << 50}},
        {f"part{n}": {"sha256": "0" * 64, "bytes": 0} for n in range(2000)},
        {"state.bin": {"sha256": "0" * 64, "bytes": -1}},
        {"../../../.bashrc": {"sha256": "0" * 64, "bytes": 1}},
        {"state.bin": []},
        {"state.bin": {"sha256": "0" * 64, "bytes": 1e999}},
        [],
    ],
)
def test_a_checkpoint_that_this_job_cannot_have_made_is_left_there_and_the_run_goes_on(
    own: rig.Rig, fake: FakeVast, files: Any
) -> None:
    manifest = own.image / "checkpoint/manifest.json"
    before = rig.sha256_of(manifest)
    manifest.write_text(json.dumps({"step": 1, "files": files}))
    script = own.image / "bin/milktea-train"
    script.write_text(script.read_text().replace(before, rig.sha256_of(manifest)))
    outcome, lines, screen = rig.whole_run(own, fake)
    assert outcome.adapter_zip.is_file()
    assert "checkpoint" not in [line.kind for line in lines]
    assert any("checkpoint 1 not mirrored" in told for told in screen.told)
    assert not list(own.runs.glob("*/checkpoints/1"))


def test_events_without_end_are_not_taken_home(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "EVENTS_BYTES", 50)
    outcome, _, _ = rig.whole_run(own, fake)
    assert isinstance(outcome, Failed) and "no training tells more than 50" in str(outcome)


def test_a_disk_full_in_the_results_folder_keeps_the_verified_adapter_and_says_where(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrieve.shutil, "copy2", full)
    outcome, lines, screen = rig.whole_run(own, fake)
    assert outcome.adapter_zip.is_file() and outcome.adapter_zip.parent.name == "result"
    [pulled] = [line for line in lines if line.kind == "pulled"]
    assert pulled["adapter"] == str(outcome.adapter_zip)
    assert any("the verified adapter is in" in told for told in screen.told)


def test_a_disk_that_is_full_for_a_while_does_not_cost_the_result(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    usage = shutil.disk_usage(own.folder)

    def filled(folder: Path) -> Any:
        tries.append(1)
        return usage._replace(free=0) if 2 < len(tries) < 6 else usage

    monkeypatch.setattr("ops.box.pull.shutil.disk_usage", filled)
    outcome, _, screen = rig.whole_run(own, fake)
    assert outcome.adapter_zip.is_file()
    assert any("make room: it is tried again" in told for told in screen.told)


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(own.folder)
    monkeypatch.setattr("ops.box.pull.shutil.disk_usage", lambda folder: usage._replace(free=0))
    monkeypatch.setattr(retry, "FULL_PATIENCE_S", 0.0)
    outcome, _, _ = rig.whole_run(own, fake, when_silent="destroy")
    assert isinstance(outcome, PreflightError) and "make room" in outcome.hint
    assert fake.instances() == []


def test_a_disk_that_stays_full_leaves_the_result_on_a_box_that_works_alone(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, plan = shutil.disk_usage(own.folder), own.plan()
    with monkeypatch.context() as full:
        full.setattr("ops.box.pull.shutil.disk_usage", lambda folder: usage._replace(free=0))
        full.setattr(retry, "FULL_PATIENCE_S", 0.0)
        outcome, _, screen = rig.whole_run(own, fake, plan=plan)
    assert isinstance(outcome, Detached) and len(fake.instances()) == 1
    assert any("the result waits on the box" in told for told in screen.told)
    outcome, lines, _ = rig.whole_run(own, fake, plan=plan)
    assert outcome.adapter_zip.is_file() and fake.instances() == []
    assert [line.kind for line in lines].count("launched") <= 2
