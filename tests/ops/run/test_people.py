"""Several people: a user in each label, one folder of runs that they share, and what one of them
may do with a run of another."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import milktea
import rig
from ops.cli.app import app
from ops.errors import ConfigError, NotYours
from ops.fakevast import FakeVast
from ops.job import label
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run import journal, wishes
from ops.run.absence import until_absent
from ops.run.boxes import rented as boxes_of
from ops.run.folders import ours
from ops.run.interrupt import obey
from ops.run.journal import Journal
from ops.run.people import closed
from ops.run.reap import reap
from ops.run.rental import rent
from ops.run.session import Interrupted

RUN_ID = "tea-20261127-063000-ab12"


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{RUN_ID}.alice", (RUN_ID, "alice")),
        (RUN_ID, (RUN_ID, "")),
        (f"{RUN_ID}.", None),
        (f"{RUN_ID}.Alice", None),
        (f"{RUN_ID}.a.b", None),
        (f"{RUN_ID}.{'a' * 33}", None),
        (f"{RUN_ID}\n", None),
        ("sweep", None),
        ("", None),
    ],
)
def test_a_label_names_a_run_and_who_rented_or_is_none_of_ours(text, found) -> None:
    named = label.parse(text)
    assert (named and (named.run_id, named.user)) == found
    assert named is None or (str(named) == text and label.is_of(text, RUN_ID))


def test_a_user_is_milktea_user_or_the_login_name_in_plain_characters(monkeypatch) -> None:
    assert label.this_user({"MILKTEA_USER": "alice_2"}) == "alice_2"
    assert label.USER.fullmatch(label.this_user({}))
    for name, uid, wanted in (("Zoë Öz", 5, "zo-z"), ("茶", 1007, "uid1007"), ("_apt", 42, "apt")):
        entry = type("Entry", (), {"pw_name": name})
        monkeypatch.setattr("ops.job.label.pwd.getpwuid", lambda uid, entry=entry: entry)
        assert label.login_name(uid) == wanted
    with pytest.raises(ConfigError, match="cannot stand in a label"):
        label.this_user({"MILKTEA_USER": "a/b"})


# -- one run of alice, and bob ---------------------------------------------------------------------


def as_user(name: str) -> pytest.MonkeyPatch:
    patched = pytest.MonkeyPatch()
    patched.setenv("MILKTEA_USER", name)
    return patched


@pytest.fixture
def run(own: rig.Rig, fake: FakeVast) -> Iterator[milktea.Run]:
    """A run of alice, with a box that no process owns, which bob sees."""
    plan = own.plan(user="alice")
    with Journal(own.runs / plan.run_id) as held:
        session = rig.client(plan, held, fake.url, fake.api_key)
        session.remember_place()
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        session.note("booted", instance_id=rent(session, found[0]))
    patched = as_user("bob")
    patched.setenv("VAST_URL", fake.url)
    patched.setenv("VAST_API_KEY", fake.api_key)
    patched.setenv("MILKTEA_RUNS", str(own.runs))
    patched.setenv("MILKTEA_PACE", str(rig.PACE))
    yield milktea.Run(held.folder)
    patched.undo()
    until_absent(session.vast, plan.run_id)


def typed(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_a_box_is_labelled_with_its_run_and_its_user(fake: FakeVast, run: milktea.Run) -> None:
    assert [row["label"] for row in fake.instances()] == [f"{run.id}.alice"]
    assert (run.user, run.is_mine) == ("alice", False)


def test_a_run_of_a_colleague_is_shown_with_whose_it_is_and_what_the_account_pays(
    fake: FakeVast, own: rig.Rig, run: milktea.Run
) -> None:
    code, said = typed("status", "--all")
    assert code == 0 and f"{run.id}  of alice  alone" in said
    (row,) = fake.instances()
    assert f"boxes of this account: 1, {row['dph_total']:.3f} $/h" in said
    assert f"{row['dph_total']:.3f} $/h  {run.id}  of alice" in said
    told = [json.loads(line) for line in typed("status", "--all", "--json")[1].splitlines()]
    assert [t.get("user") for t in told if "user" in t] == ["alice", "alice"]
    assert typed("status")[1].count("box") == 1, "without --all vast.ai is not asked"


def test_what_would_change_a_run_of_another_is_refused_in_words(
    fake: FakeVast, run: milktea.Run
) -> None:
    before = (run.folder / journal.FILE).read_bytes()
    for words in (
        ["stop", "RUN", "--destroy"],
        ["stop", "RUN", "--fetch"],
        ["destroy", "RUN"],
        ["resume", "RUN"],
        ["exec", "RUN", "ls"],
        ["stop", "RUN", "--fetch", "--yes"],  # its key is alice's alone
    ):
        code, said = typed(*[run.id if w == "RUN" else w for w in words])
        assert code == 8 and f"{run.id} is a run of alice, and you are bob" in said, words
        assert "nothing was changed" in said
    with pytest.raises(NotYours):
        milktea.stop(run, "destroy")
    code, said = typed("reap")
    assert code == 0 and "its box is one of alice" in said and "--foreign" in said
    assert (run.folder / journal.FILE).read_bytes() == before and len(fake.instances()) == 1


@pytest.mark.parametrize("words", [["destroy"], ["stop", "--destroy"], ["reap", "--foreign"]])
def test_whoever_says_that_a_run_of_another_is_meant_ends_it(
    fake: FakeVast, run: milktea.Run, words: list[str]
) -> None:
    named = [] if words[0] == "reap" else [run.id]
    code, said = typed(*words, *named, "--yes")
    assert code == 0 and fake.instances() == [], said
    assert run.status().stage == "destroyed"


def test_a_box_of_a_colleague_whose_folder_is_closed_is_not_reaped(
    own: rig.Rig, fake: FakeVast, run: milktea.Run
) -> None:
    """As its label tells; its journal cannot be read."""
    hidden = run.folder / "hidden"
    (run.folder / journal.FILE).rename(hidden)
    vast = Vast(Provider(fake.url, fake.api_key), rig.Jumping())
    reaped = reap(own.runs, vast, rig.Silent())
    assert reaped.foreign == [f"{run.id}.alice"] and reaped.destroyed == []
    assert [(b.user, b.run_id, b.is_here) for b in boxes_of(vast, own.runs)] == [
        ("alice", run.id, True)
    ]
    hidden.rename(run.folder / journal.FILE)


def test_the_last_run_is_the_last_of_ones_own(own: rig.Rig, run: milktea.Run) -> None:
    mine = own.plan(user="bob", run_id="aa-20200101-000000-0000")
    assert milktea.find_run("last", own.runs).id == run.id, "there is none of bob's"
    with Journal(own.runs / mine.run_id) as held:
        held.append("planned", **mine.to_line())
    assert milktea.find_run("last", own.runs).id == mine.run_id


def test_a_run_and_a_box_of_before_there_were_users_are_found_and_reaped(
    own: rig.Rig, fake: FakeVast
) -> None:
    plan = own.plan()
    line = plan.to_line()
    del line["user"]
    with Journal(own.runs / plan.run_id) as held:
        held.append("planned", **line)
        session = rig.client(plan, held, fake.url, fake.api_key, clock=rig.Jumping())
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        rent(session, found[0])
    assert [row["label"] for row in fake.instances()] == [plan.run_id]
    assert milktea.Run(held.folder).is_mine, "by who owns the folder"
    assert reap(own.runs, session.vast, rig.Silent()).destroyed == [plan.run_id]


def test_the_journal_says_which_colleague_ended_a_run(own: rig.Rig) -> None:
    plan = own.plan(user="alice")
    with Journal(own.runs / plan.run_id) as held:
        session = rig.client(plan, held, "http://127.0.0.1:1", "key")
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("MILKTEA_USER", "bob")
            assert wishes.send(held.folder, wishes.DESTROY) == wishes.DESTROY
        session.wish = wishes.DESTROY
        with pytest.raises(Interrupted):
            obey(session, None)
    assert held.lines[-1].data == {"chosen": "destroy", "user": "bob"}
    assert "bob       chose: destroy" in "\n".join(milktea.Run(held.folder).explain())


# -- a shared folder -------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("of_root", "of_run", "of_file"),
    [(0o2770, 0o2770, 0o660), (0o2775, 0o700, 0o600), (0o770, 0o700, 0o600), (0o700, 0o700, 0o600)],
)
def test_a_group_reads_runs_only_in_a_folder_that_is_the_groups_alone(
    own: rig.Rig, of_root: int, of_run: int, of_file: int
) -> None:
    own.runs.chmod(of_root)
    before = os.umask(0o077)
    try:
        with Journal(own.runs / RUN_ID) as held:
            held.append("planned", **own.plan(user="alice").to_line())
            session = rig.client(own.plan(), held, "http://127.0.0.1:1", "key")
            session.make_key()
            wishes.send(held.folder, wishes.DESTROY)
            open(held.folder / "watched", "a", opener=ours).close()
    finally:
        os.umask(before)
    assert mode(held.folder) & 0o2777 == of_run
    files = (journal.FILE, "lock", wishes.FILE, "watched")
    assert [mode(held.folder / name) for name in files] == [of_file] * 4
    assert mode(held.folder / "id_ed25519") == 0o600, "a key is its owner's alone"


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_run_that_a_colleague_closed_is_named(own: rig.Rig) -> None:
    (own.runs / RUN_ID).mkdir(parents=True)
    (own.runs / RUN_ID).chmod(0)
    assert closed(own.runs) == [(RUN_ID, label.login_name(os.getuid()))]
