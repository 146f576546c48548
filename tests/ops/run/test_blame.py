"""Whose fault it was: a machine that failed by itself is not taken again, a fault that two machines
share is not theirs, and progress is no failed try."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

import rig
from ops.errors import Failed, Lost, NeverReady, PreflightError, Unsuitable
from ops.fakevast import FakeVast
from ops.market.ranking import Needs
from ops.market.workload import Workload
from ops.run import blame, explain, follow
from ops.run.journal import Journal, Line
from ops.run.meter import spent_usd
from ops.run.on_rented_box import MAX_MACHINES, offers, remember_failure

ECC = "CUDA error: uncorrectable ECC error encountered"


def machines(lines: list[Line]) -> list[int]:
    return [line["offer"]["machine_id"] for line in lines if line.kind == "renting"]


FULL = "[Errno 28] No space left on device: 'checkpoints/20.new'"


@pytest.mark.parametrize(("word", "said"), [(ECC, "its GPU died"), (FULL, "its disk is full")])
def test_a_machine_that_broke_is_not_rented_again_and_the_run_goes_on_elsewhere(
    own: rig.Rig, fake: FakeVast, word: str, said: str
) -> None:
    (own.image / "die-once").write_text(word)
    outcome, lines, _ = rig.whole_run(own, fake)
    assert outcome.adapter_zip.is_file()
    first, second = machines(lines)
    [bad] = [line for line in lines if line.kind == "bad_machine"]
    assert bad["machine_id"] == first != second and said in bad["why"]
    bills = [line["usd"] for line in lines if line.kind == "bill"]
    assert len(bills) == 2 and min(bills) > 0
    assert explain.billed_usd(lines) == pytest.approx(sum(bills), abs=2e-6)
    assert explain.billed_usd([line for line in lines if line is not lines[-1]]) is None
    told = "\n".join(explain.cost_lines(lines, lines[-1].t))
    assert f"for 2 machines together: {sum(bills):.4f} $" in told
    assert sum(bills) == pytest.approx(spent_usd(lines, lines[-1].t), abs=0.02)


@pytest.mark.parametrize(
    ("text", "word"), [(ECC, "uncorrectable ecc"), (FULL, "no space left on device")]
)
def test_what_breaks_two_machines_is_the_job_s_fault_and_renting_stops(
    own: rig.Rig, fake: FakeVast, text: str, word: str
) -> None:
    (own.image / "die").write_text(text)
    outcome, lines, _ = rig.whole_run(own, fake)
    assert isinstance(outcome, Failed) and f"2 of them said '{word}'" in str(outcome)
    assert len(machines(lines)) == 2


def test_a_training_that_fails_by_itself_blames_no_machine(own: rig.Rig, fake: FakeVast) -> None:
    (own.image / "die").write_text("the loss is not a number")
    outcome, lines, _ = rig.whole_run(own, fake)
    assert isinstance(outcome, Failed)
    assert len(machines(lines)) == 1 and "bad_machine" not in [line.kind for line in lines]


def test_a_machine_that_never_comes_to_its_first_step_is_blamed_and_the_next_is_taken(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "START_FACTOR", 0.0)
    (own.image / "hang").touch()
    outcome, lines, _ = rig.whole_run(own, fake, stall_s=0.3)
    assert isinstance(outcome, Failed) and "no first step within" in str(outcome)
    assert len(set(machines(lines))) == 2, "two machines: then it is the job"


def test_two_consumer_cards_that_hang_at_first_are_tried_once_without_reaching_each_other(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "START_FACTOR", 0.0)
    (own.image / "hang").touch()
    outcome, lines, screen = rig.whole_run(
        own,
        fake,
        stall_s=0.3,
        needs=Needs(("RTX 4090",), num_gpus=2, min_reliability=0.9, hours=2, disk_gib=16),
        workload=Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8, num_gpus=2),
    )
    assert outcome.adapter_zip.is_file(), outcome
    assert len(machines(lines)) == 1, "the same box"
    started = [line for line in lines if line.kind == "launched"]
    assert [line["settings"] for line in started] == [{}, {"NCCL_P2P_DISABLE": "1"}]
    assert any("once more with NCCL_P2P_DISABLE=1" in told for told in screen.told)


def test_a_machine_that_saved_a_checkpoint_is_no_failed_try(own: rig.Rig, fake: FakeVast) -> None:
    """Outbid again and again, each machine having brought the run on: only money and hours end
    that."""
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        taken = []
        for offer in offers(session, None):
            taken.append(offer.id)
            session.note(
                "renting", offer=asdict(offer), bid_usd_per_hour=None, disk_gib=16, max_s=9
            )
            session.note("missed", machine_id=offer.machine_id, offer_id=offer.id, why="outbid")
            if len(taken) <= MAX_MACHINES + 2:
                session.note("checkpoint", step=len(taken), folder="x")
            session.note("absent", reads=3)
        assert len(taken) == MAX_MACHINES + 2 + MAX_MACHINES


@pytest.mark.parametrize(
    ("name", "num_gpus", "lacks"),
    [
        ("RTX 4090", 2, True),
        ("RTX 3080 Ti", 4, True),
        ("RTX 4090", 1, False),
        ("H100 SXM", 8, False),
        ("RTX 4000Ada", 2, False),
        ("RTX A6000", 2, False),
        ("RTX PRO 6000 WS", 2, False),
    ],
)
def test_only_several_consumer_cards_may_say_that_they_reach_each_other_and_not_do_so(
    name: str, num_gpus: int, lacks: bool
) -> None:
    assert blame.p2p_may_hang(name, num_gpus) is lacks


@pytest.mark.parametrize("hosts", [(5, 5), (5, 6), (0, 0)])
def test_two_machines_of_one_owner_do_not_speak_against_the_image(
    own: rig.Rig, fake: FakeVast, hosts: tuple[int, int]
) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        ours = [
            replace(offer, machine_id=n, host_id=host)
            for n, (offer, host) in enumerate(zip(found, hosts, strict=False), 1)
        ]
        word = "OCI runtime create failed: no such device"
        remember_failure(session, ours[0], NeverReady(word))
        if hosts[0] == hosts[1] != 0:
            remember_failure(session, ours[1], NeverReady(word))
        else:
            with pytest.raises(PreflightError, match="starts on no machine: 2 of them said"):
                remember_failure(session, ours[1], NeverReady(word))


def test_each_failure_has_the_word_of_its_kind() -> None:
    assert blame.fatal_word(NeverReady("docker: pull access denied for x")) == "pull access denied"
    assert blame.fatal_word(Unsuitable("its GPU died (uncorrectable ecc)")) == "uncorrectable ecc"
    assert blame.fatal_word(Unsuitable("its driver 1 is older")) is None
    assert blame.fatal_word(Lost("pull access denied")) is None
