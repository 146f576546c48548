"""Tokens reach the box at launch and are nowhere else here: in no file, record or argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import PreflightError
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.run.journal import Journal
from ops.run.rent_and_train import rent_and_train
from trainer.wire import events

TOKEN = "hf_nobody_may_find_this_anywhere"


def with_token(own: rig.Rig, **more: Any) -> Plan:
    plan = own.plan(**more)
    plan.wire_job["environment"] = ["HF_TOKEN"]
    return plan


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:  # it ended meanwhile
            continue
    return found


class Looking(rig.Silent):
    """Looks at every process and at the instance's record while the box trains."""

    def __init__(self, fake: FakeVast) -> None:
        super().__init__()
        self.fake, self.seen, self.warnings = fake, "", []

    def event(self, event: events.Event, *rest: Any) -> None:
        if isinstance(event, events.Warned):
            self.warnings.append(event.message)
        self.seen += "\n".join(command_lines()) + repr(self.fake.instances())


def holding(folder: Path, text: str) -> list[Path]:
    return [
        p
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and text.encode() in p.read_bytes()
    ]


def test_a_token_reaches_the_box_and_is_in_no_file_record_or_process_list_here(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plan, screen = with_token(own), Looking(fake)
    with Journal(own.runs / plan.run_id) as j:
        outcome = rent_and_train(rig.client(plan, j, fake.url, fake.api_key, screen=screen))
    assert outcome.adapter_zip.is_file()
    assert screen.warnings == [f"a token of {len(TOKEN)} letters came"]
    assert "HF_TOKEN" in (own.runs / plan.run_id / "job.json").read_text()
    assert screen.seen and TOKEN not in screen.seen
    assert holding(own.folder, TOKEN) == []
    assert TOKEN not in repr(fake.requests)


def test_a_token_that_is_missing_here_rents_nothing(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(own.folder / "no-login"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(own.folder / "none"))
    plan = with_token(own)
    with Journal(own.runs / plan.run_id) as j, pytest.raises(PreflightError, match="not set here"):
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    assert not any(r["route"] == "create" for r in fake.requests)


def test_the_login_of_a_private_registry_goes_with_the_order_and_into_no_file(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHCR_LOGIN", f"me:{TOKEN}")
    sent: list[Any] = []
    from ops.market import client

    real = client.build_create_instance_payload

    def look(**told: Any) -> Any:
        sent.append(real(**told))
        return sent[-1]

    monkeypatch.setattr(client, "build_create_instance_payload", look)
    plan = own.plan(image_login="GHCR_LOGIN")
    with Journal(own.runs / plan.run_id) as j:
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    assert sent[0]["image_login"] == f"-u me -p {TOKEN} docker.io"
    assert holding(own.runs, TOKEN) == [] and holding(own.folder / "out", TOKEN) == []
