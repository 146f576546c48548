"""A run that was rented by one account, and every command that another account, or nobody, types:
nothing is changed, and both places are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import milktea
import rig
from ops.cli.app import app
from ops.fakevast import FakeVast
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run import journal
from ops.run.absence import until_absent
from ops.run.journal import Journal
from ops.run.rental import rent
from ops.wait import RealClock

CHANGES = {  # the commands that would act on the run, and how they end: 8 is Elsewhere
    "resume": [(["resume", "RUN"], 8), (["resume", "RUN", "--foreground"], 8)],
    "stop": [(["stop", "RUN", f"--{end}"], 8) for end in ("fetch", "keep-disk", "destroy")],
    "destroy": [(["destroy", "RUN"], 8)],
    "reap": [(["reap"], 0), (["reap", "--foreign"], 0)],
    "ssh": [(["ssh", "RUN"], 8)],
    "exec": [(["exec", "RUN", "touch", "x"], 8)],
    "forward": [(["forward", "RUN", "6006"], 8)],
}
READS = {  # a run that nobody owns: its last owner was killed, which is `attach`'s 8
    "status": [(["status"], 0), (["status", "RUN", "--json"], 0)],
    "attach": [(["attach", "RUN"], 8)],
    "logs": [(["logs", "RUN"], 0)],
    "cost": [(["cost", "RUN"], 0)],
    "explain": [(["explain", "RUN"], 0)],
}
# these begin with what an earlier run left; the others speak to no market
BEGIN = {"rent-and-train", "plan", "sweep"}
OTHER = {
    *("init", "models", "gpus", "chat", "evaluate", "merge", "serve", "export", "schema"),
    *("image", "adapter", "data", "compare", "tensorboard", "web"),
}


@pytest.fixture
def run(own: rig.Rig, fake: FakeVast) -> Iterator[milktea.Run]:
    """A run with a box of account A, whose training was launched and that nobody owns."""
    size = {"image_bytes": 4e8, "model_download_bytes": 3e11}  # worth to be kept
    work = rig.Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, **size)
    plan = own.plan(workload=work, max_usd=50.0, max_s=360_000.0)
    with Journal(own.runs / plan.run_id) as held:
        session = rig.client(plan, held, fake.url, fake.api_key)
        session.remember_place()
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        session.note("booted", instance_id=rent(session, found[0]))
        session.note("launched", state="started")
    yield milktea.Run(held.folder)
    until_absent(Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE)), plan.run_id)


def test_every_command_is_held_to_the_account_of_a_run_or_speaks_to_none() -> None:
    typed = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    typed |= {group.name or "" for group in app.registered_groups}
    assert typed == {*CHANGES, *READS, *BEGIN, *OTHER}


def typed(words: list[str], run: milktea.Run, env: dict[str, str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, [run.id if w == "RUN" else w for w in words], env=env)
    return done.exit_code, done.output


def hold(run: milktea.Run, fake: FakeVast, env: dict[str, str], other: str) -> None:
    """Type every command with this environment; `other` is the id of its account."""
    before, asked = (run.folder / journal.FILE).read_bytes(), len(fake.requests)
    for commands in (*CHANGES.values(), *READS.values()):
        for words, code in commands:
            got, said = typed(words, run, env)
            assert got == code, (words, said)
            if words[0] in CHANGES:
                assert f"account {fake.cloud.account.id}" in said, words
                assert f"account {other}" in said and "nothing was touched" in said, words
    assert (run.folder / journal.FILE).read_bytes() == before
    methods = {r["method"] for r in fake.requests[asked:]}
    assert methods <= {"GET"}, "only the box's own watchdog asks account A"
    assert len(fake.instances()) == 1


def environment(own: rig.Rig, **more: str) -> dict[str, str]:
    names = dict.fromkeys(("VAST_API_KEY", "VAST_URL", "MILKTEA_EMULATOR"), "")
    return names | {"MILKTEA_RUNS": str(own.runs), "MILKTEA_PACE": str(rig.PACE)} | more


def test_another_account_changes_nothing_by_any_command_and_both_are_named(
    own: rig.Rig, fake: FakeVast, run: milktea.Run, tmp_path: Path
) -> None:
    with FakeVast(tmp_path / "other") as other:

        def be_another() -> None:
            other.cloud.account.id += 1

        other.do(be_another)
        env = environment(own, VAST_URL=other.url, VAST_API_KEY=other.api_key)
        hold(run, fake, env, str(other.cloud.account.id))
        assert {r["method"] for r in other.requests} == {"GET"}, "nothing that changes anything"


@pytest.mark.slow
def test_without_a_key_the_emulator_changes_nothing_by_any_command_and_both_are_named(
    own: rig.Rig, fake: FakeVast, run: milktea.Run, tmp_path: Path
) -> None:
    """The embedded emulator stands for another account: it is not where the run was rented."""
    fake.do(lambda: setattr(fake.cloud.account, "id", 77))
    path, rented_by = run.folder / journal.FILE, run.journal[1]["account"]
    path.write_text(path.read_text().replace(f'"account": "{rented_by}"', '"account": "77"'))
    folder = tmp_path / "embedded"
    env = environment(own, MILKTEA_EMULATOR=str(folder))
    with pytest.MonkeyPatch.context() as patched:
        for name in ("VAST_API_KEY", "VAST_URL"):
            patched.delenv(name, raising=False)
        patched.setenv("MILKTEA_EMULATOR", str(folder))
        market = milktea.open_market(os.environ)
        hold(run, fake, env, market.account())
        assert market.labels() == []


def test_boxes_that_were_begun_in_another_folder_are_listed_and_asked_about_first(
    own: rig.Rig, fake: FakeVast, run: milktea.Run, tmp_path: Path
) -> None:
    env = environment(own, VAST_URL=fake.url, VAST_API_KEY=fake.api_key)
    env |= {"MILKTEA_RUNS": str(tmp_path / "empty")}
    code, said = typed(["reap", "--foreign"], run, env)
    assert code == 2 and run.id in said and "reap --foreign --yes" in said
    assert len(fake.instances()) == 1
    code, said = typed(["reap", "--foreign", "--yes"], run, env)
    assert code == 0 and f"{run.id}: destroyed" in said and fake.instances() == []
