"""The main job against the emulator: real HTTP, real SSH, real processes; only the training is a
stub that takes no time."""

from __future__ import annotations

import json
import os
import re
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import (
    AdapterError,
    BoxLeaked,
    Failed,
    HostKeyChanged,
    JournalError,
    NoOffer,
    OfferGone,
    OverBudget,
    Refused,
    Stalled,
)
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run import journal
from ops.run.choose import search
from ops.run.journal import Journal
from ops.run.reap import finish_destroys, reap
from ops.run.rent_and_train import rent_and_train
from ops.run.session import Detached, Interrupted, Session
from ops.wait import RealClock
from trainer.wire import events

METER = re.compile(r"spent 0\.\d{4} \$ of 1\.00 \$")


def run(own: rig.Rig, fake: FakeVast, **more: Any) -> tuple[Any, list[journal.Line]]:
    outcome, lines, _ = rig.whole_run(own, fake, **more)
    return outcome, lines


def kinds(lines: list[journal.Line]) -> list[str]:
    return [line.kind for line in lines]


def creates(fake: FakeVast) -> int:
    return sum(r["route"] == "create" for r in fake.requests)


def test_the_main_job_brings_a_verified_adapter_home_and_leaves_no_box(
    own: rig.Rig, fake: FakeVast
) -> None:
    outcome, lines = run(own, fake)
    assert zipfile.ZipFile(outcome.adapter_zip).testzip() is None
    assert kinds(lines) == [
        "planned",
        "place",
        "offers",
        "renting",
        "rented",
        "booted",
        "connected",
        "pushed",
        "launched",
        "event",
        "checkpoint",
        "event",
        "ended",
        "pulled",
        "destroying",
        "destroyed",
        "bill",
    ]
    destroyed = next(line for line in lines if line.kind == "destroyed")
    assert len(destroyed["reads"]) == 3
    assert creates(fake) == 1
    bill = lines[-1]
    assert bill["usd"] == pytest.approx(sum(c["amount"] for c in fake.charges()), abs=1e-5)


@pytest.mark.parametrize(("offers", "searches"), [(20, 1), (64, 2)])
def test_a_market_that_one_search_shows_whole_is_asked_once(
    own: rig.Rig, fake: FakeVast, offers: int, searches: int
) -> None:
    """A search shows 64 offers at most, and vast.ai answers one a second."""
    market = [
        fake.catalogue[11014] | {"machine_id": n, "slices": (1,)} for n in range(1, offers + 1)
    ]
    with own.emulator(market=market) as other:
        outcome, lines = run(own, other)
        assert outcome.sha256
        assert next(line for line in lines if line.kind == "offers")["seen"] == offers
        assert sum(r["route"] == "search" for r in other.requests) == searches


def test_the_bill_is_found_without_reading_what_older_instances_cost(
    own: rig.Rig, fake: FakeVast
) -> None:
    """They come last, 100 a page, and vast.ai answers such a question once a second."""
    run(own, fake)
    old = {**fake.charges()[0], "source": "instance-1"}
    fake.do(
        lambda: fake.cloud.account.old_charges.extend(
            {**old, "start": old["start"] - n, "end": old["end"]} for n in range(1, 251)
        )
    )
    before = len(fake.requests)
    _, lines = run(own, fake)
    assert lines[-1]["usd"] > 0
    assert sum(r["route"] == "charges" for r in fake.requests[before:]) == 1


def test_the_account_key_never_reaches_a_box(own: rig.Rig, fake: FakeVast) -> None:
    (own.image / "pause").touch()
    seen: list[str] = []

    class Looking(rig.Silent):
        def event(self, event: events.Event, *rest: Any) -> None:
            if isinstance(event, events.Step):
                home = fake.home(fake.instances()[0]["id"])
                seen.extend(
                    str(p)
                    for p in home.rglob("*")
                    if p.is_file() and fake.api_key.encode() in p.read_bytes()
                )
                seen.append("looked")
                (own.image / "pause").unlink()

    outcome, _ = run(own, fake, screen=Looking())
    assert seen == ["looked"]
    for request in fake.requests:
        assert fake.api_key not in json.dumps(request.get("body") or "")
    assert outcome.sha256


@pytest.mark.parametrize(
    "fault",
    [
        {"where": "create", "what": "lost_reply"},
        {"where": "create", "what": "502_after"},
        {"where": "create", "what": "lost_request"},
        {"where": "create", "what": "429_text"},
        {"where": "create", "what": "no_such_ask", "status": 410},
        {"where": "create", "what": "list_lag", "in": ["list", "show"], "reads": 2},
        {"where": "show", "what": "502_before"},
        {"where": "list", "what": "429_json", "times": 2},
        {"where": "destroy", "what": "lost_reply"},
        {"where": "destroy", "what": "ignored"},
        {"where": "destroy", "what": "resurrect", "reads": 2},
        {"where": "boot", "what": "pull_error"},
        {"where": "boot", "what": "oci_error"},
        {"where": "boot", "what": "exited"},
        {"where": "ssh", "what": "reset", "times": 3},
        {"where": "ssh", "what": "denied", "times": 2},
        {"where": "exec", "what": "cut", "on_call": 5},
    ],
    ids=lambda f: f"{f['where']}-{f['what']}",
)
def test_one_fault_anywhere_is_overcome(
    own: rig.Rig, fake: FakeVast, fault: dict[str, Any]
) -> None:
    fake.faults.add(fault)
    outcome, lines = run(own, fake)
    assert not isinstance(outcome, BaseException), outcome
    assert fake.faults.fired, "the fault never fired"
    assert kinds(lines)[-2:] == ["destroyed", "bill"]


def test_an_unclear_create_is_adopted_by_its_label_and_not_repeated(
    own: rig.Rig, fake: FakeVast
) -> None:
    fake.faults.add(where="create", what="lost_reply")
    _, lines = run(own, fake)
    assert creates(fake) == 1
    assert "unclear" in kinds(lines)
    assert next(line for line in lines if line.kind == "rented")["adopted"] is True


@pytest.mark.parametrize(
    "fields",
    [
        {"gpu_name": "GTX 1080"},
        {"num_gpus": 2},
        {"dph_total": 9.9},
        {"disk_space": 9.0},
        {"machine_id": 1},
    ],
    ids=lambda f: next(iter(f)),
)
def test_a_box_that_is_not_what_was_offered_gets_no_byte(
    own: rig.Rig, fake: FakeVast, fields: dict[str, Any]
) -> None:
    fake.faults.add(where="create", what="wrong_fields", fields=fields)
    outcome, lines = run(own, fake)
    first = kinds(lines)[: kinds(lines).index("bad_machine")]
    assert "pushed" not in first and "connected" not in first and "destroyed" in first
    assert not isinstance(outcome, BaseException), outcome


def test_a_box_that_lies_about_its_gpu_is_found_by_its_own_nvidia_smi(
    own: rig.Rig, fake: FakeVast
) -> None:
    fake.faults.add(where="boot", what="wrong_gpu", gpu_name="RTX 2060")
    outcome, lines = run(own, fake)
    bad = next(line for line in lines if line.kind == "bad_machine")
    assert "GPU" in bad["why"]
    assert "pushed" not in kinds(lines)[: bad.n]
    assert (
        next(o for o in lines[bad.n :] if o.kind == "renting")["offer"]["machine_id"]
        != bad["machine_id"]
    )
    assert not isinstance(outcome, BaseException), outcome


def test_a_changed_host_key_stops_the_run(own: rig.Rig, fake: FakeVast) -> None:
    fake.faults.add(where="ssh", what="new_host_key", on_call=2)
    fake.faults.add(where="exec", what="cut", on_call=4)
    outcome, lines = run(own, fake)
    assert isinstance(outcome, HostKeyChanged)
    assert "destroyed" in kinds(lines)


def test_a_failing_training_says_the_trainers_reason_and_keeps_the_checkpoint(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "fail").touch()
    outcome, _ = run(own, fake)
    assert isinstance(outcome, Failed)
    assert "exit code 4: planted" in str(outcome)
    assert outcome.exit_code == 6
    assert creates(fake) == 1, "a failing training is not rented again"


def test_a_silent_training_is_given_up(own: rig.Rig, fake: FakeVast) -> None:
    (own.image / "pause").touch()
    outcome, _ = run(own, fake, stall_s=0.5)
    assert isinstance(outcome, Stalled)


def test_a_result_that_never_verifies_is_fetched_three_times_and_refused(
    own: rig.Rig, fake: FakeVast
) -> None:
    manifest = json.loads((own.image / "result/manifest.json").read_text())
    (own.image / "result/manifest.json").write_text(json.dumps(manifest | {"final_loss": None}))
    outcome, lines = run(own, fake)
    assert isinstance(outcome, AdapterError)
    assert kinds(lines).count("bad_result") == 3
    assert METER.fullmatch(outcome.money), "the box is destroyed by now"
    assert not list((own.folder / "out").glob("*/adapter.zip"))


class Interrupting(rig.Silent):
    """Presses Ctrl-C at the first step."""

    def __init__(self, choice: str, image: Path) -> None:
        super().__init__(choice)
        self.image, self.pressed = image, False

    def event(self, event: events.Event, *rest: Any) -> None:
        if isinstance(event, events.Step) and not self.pressed:
            self.pressed = True
            raise Interrupted


@pytest.mark.parametrize("choice", ["destroy", "fetch"])
def test_ctrl_c_destroys_or_fetches_then_destroys(
    own: rig.Rig, fake: FakeVast, choice: str
) -> None:
    (own.image / "pause").touch()
    outcome, lines = run(own, fake, screen=Interrupting(choice, own.image))
    assert isinstance(outcome, Failed)
    assert next(line for line in lines if line.kind == "interrupted")["chosen"] == choice
    assert "destroyed" in kinds(lines)


def test_ctrl_c_can_leave_the_box_and_resume_finds_it(own: rig.Rig, fake: FakeVast) -> None:
    (own.image / "pause").touch()
    plan = own.plan()
    outcome, lines = run(own, fake, screen=Interrupting("leave", own.image), plan=plan)
    assert isinstance(outcome, Detached)
    assert "destroyed" not in kinds(lines)
    assert len(fake.instances()) == 1
    (own.image / "pause").unlink()
    outcome, lines = run(own, fake, plan=plan)
    assert outcome.sha256
    assert creates(fake) == 1


def test_a_client_killed_while_training_is_resumed_on_the_same_box(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "pause").touch()
    plan = own.plan()
    child = os.fork()
    if child == 0:  # the client: dies at its first step event

        class Dying(rig.Silent):
            def event(self, event: events.Event, *rest: Any) -> None:
                if isinstance(event, events.Step):
                    os.kill(os.getpid(), signal.SIGKILL)

        run(own, fake, screen=Dying(), plan=plan)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (own.image / "pause").unlink()
    outcome, _ = run(own, fake, plan=plan)
    assert outcome.sha256
    assert creates(fake) == 1
    said = [
        events.parse(text)
        for text in (own.runs / plan.run_id / "events.jsonl").read_text().splitlines()
    ]
    assert [type(e).__name__ for e in said] == ["Started", "Step", "Checkpoint", "Finished"], (
        "a gap or a double line"
    )


def test_a_second_client_on_a_run_is_kept_out(own: rig.Rig, fake: FakeVast) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        j.append("planned", **plan.to_line())
        with pytest.raises(JournalError, match="another milktea"), Journal(own.runs / plan.run_id):
            pass


def test_a_box_that_is_taken_away_goes_on_elsewhere_from_the_checkpoint_within_one_budget(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "pause").touch()
    needs = rig.Needs(min_reliability=0.9, hours=2, disk_gib=16, interruptible=True)

    class Outbidding(rig.Silent):
        def event(self, event: events.Event, *rest: Any) -> None:
            if (
                isinstance(event, events.Step)
                and len(fake.requests)
                and (own.image / "pause").exists()
            ):
                fake.do(lambda: fake.cloud.outbid(fake.instances_now()[0]))
                (own.image / "pause").unlink()

    fake.instances_now = lambda: list(fake.cloud.instances)  # type: ignore[attr-defined]
    outcome, lines = run(own, fake, screen=Outbidding(), needs=needs)
    assert outcome.sha256, outcome
    assert "preempted" in kinds(lines)
    assert kinds(lines).count("renting") == 2
    assert lines[-1]["usd"] < 1.0


def test_the_market_that_was_shown_is_not_asked_for_again(own: rig.Rig, fake: FakeVast) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        shown = search(session)
        outcome = rent_and_train(session, seen=shown)
        assert j.last("renting")["offer"]["id"] == shown.accepted[0].offer.id
    assert outcome.sha256
    assert sum(r["route"] == "search" for r in fake.requests) == 1


def test_a_destroy_that_cannot_be_proven_is_a_leak_and_the_next_command_finishes_it(
    own: rig.Rig, fake: FakeVast, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ops.run.absence.DESTROY_PATIENCE_S", 100.0)
    fake.faults.add(where="destroy", what="ignored", times=None)
    outcome, lines = run(own, fake)
    assert isinstance(outcome, BoxLeaked) and outcome.exit_code == 70
    assert re.fullmatch(
        r"it may be billing 0\.\d+ \$/h; its own watchdog ends it at \w+ \d\d:\d\d",
        outcome.money,
    )
    assert "leaked" in kinds(lines)
    fake.faults.clear()
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    assert finish_destroys(own.runs, vast, rig.Silent()).destroyed == [lines[0]["run_id"]]
    assert finish_destroys(own.runs, vast, rig.Silent()).destroyed == []


def test_a_damaged_journal_is_reaped_by_its_label(own: rig.Rig, fake: FakeVast) -> None:
    (own.image / "pause").touch()
    plan = own.plan()
    outcome, _ = run(own, fake, screen=Interrupting("leave", own.image), plan=plan)
    path = own.runs / plan.run_id / journal.FILE
    path.write_bytes(path.read_bytes().replace(b'"rented"', b'"rented', 1))
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    reaped = reap(own.runs, vast, rig.Silent())
    assert isinstance(outcome, Detached)
    assert reaped.destroyed == [plan.run_id]


def test_a_box_of_another_machines_run_is_left_alone_unless_asked_for(
    own: rig.Rig, fake: FakeVast, tmp_path: Path
) -> None:
    (own.image / "pause").touch()
    outcome, lines = run(own, fake, screen=Interrupting("leave", own.image))
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    assert "--foreign" in reap(empty, vast, rig.Silent()).left[0]
    assert len(fake.instances()) == 1
    assert reap(empty, vast, rig.Silent(), foreign=True).destroyed == [lines[0]["run_id"]]
    assert isinstance(outcome, Detached)


def test_no_money_for_any_offer_is_said_before_renting(own: rig.Rig, fake: FakeVast) -> None:
    outcome, lines = run(own, fake, max_usd=1e-6)
    assert isinstance(outcome, OverBudget)
    assert "renting" not in kinds(lines)
    assert outcome.money == "spent 0.0000 $ of 0.00 $"


def test_no_offer_names_the_filter_that_keeps_most_out(own: rig.Rig, fake: FakeVast) -> None:
    outcome, _ = run(
        own,
        fake,
        needs=rig.Needs(min_gpu_memory_gib=500, hours=2, disk_gib=16, min_reliability=0.9),
    )
    assert isinstance(outcome, NoOffer)
    assert "min_gpu_memory_gib" in str(outcome)


@pytest.mark.parametrize("what", ["insufficient_credit", "spend_rate_limit"])
def test_a_refusal_for_lack_of_credit_is_not_tried_on_other_offers(
    own: rig.Rig, fake: FakeVast, what: str
) -> None:
    fake.faults.add(where="create", what=what, times=None)
    outcome, _ = run(own, fake)
    assert isinstance(outcome, Refused) and "credit" in outcome.hint
    assert creates(fake) == 1


def test_offers_that_all_vanish_end_in_a_clear_error(own: rig.Rig, fake: FakeVast) -> None:
    fake.faults.add(where="create", what="no_such_ask", status=404, times=None)
    outcome, lines = run(own, fake)
    assert isinstance(outcome, NoOffer | OfferGone)
    assert kinds(lines).count("renting") == 5
    assert METER.fullmatch(outcome.money)


def test_the_second_session_needs_nothing_but_the_run_folder(own: rig.Rig, fake: FakeVast) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        j.append("planned", **plan.to_line())
        again = Plan.from_line(j.lines[0])
        assert again == plan
        assert isinstance(rig.client(again, j, fake.url, fake.api_key), Session)
        assert {p.name for p in j.folder.iterdir()} == {journal.FILE, "lock"}, (
            "a client that is made writes nothing"
        )


def test_a_signal_in_the_middle_of_a_journal_line_waits_for_its_end(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a line is being written, a box being rented or destroyed: each is finished
    first, and the journal stays whole."""
    plan = own.plan()
    real = os.fsync
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)

        def fsync(fd: int) -> None:
            session.shield.interrupt()
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(Interrupted):
            rent_and_train(session)
    assert kinds(journal.read(own.runs / plan.run_id)) == ["planned", "place", "interrupted"]
