"""Talking to a result on a rented box, against the emulator: real HTTP, real SSH, real processes;
only the server of the model is a stub."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

import milktea
import rig
from ops.errors import Failed, JournalError
from ops.fakevast import FakeVast
from ops.market.provider import Provider
from ops.run import journal, supervisor, wishes
from ops.run import talk as talking
from ops.run.journal import Journal
from ops.wait import RealClock, until


@pytest.fixture
def vast(fake: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


@pytest.fixture(autouse=True)
def looks_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talking, "METER_S", 0.2)


@pytest.fixture
def result(own: rig.Rig, fake: FakeVast) -> milktea.Found:
    """Of a run that trained, and is over."""
    plan = own.plan()
    adapter = own.folder / "out" / plan.run_id / "adapter.zip"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes((own.image / "result/adapter.zip").read_bytes())
    with Journal(own.runs / plan.run_id) as held:
        held.append("planned", **plan.to_line())
        held.append("pulled", adapter=str(adapter), sha256="0" * 64)
    return milktea.find_result(plan.run_id, root=own.runs)


class Talker(milktea.Quiet):
    """Does `act` with the page's address, once, in a thread as a browser would, and leaves;
    `faults` has what went wrong there."""

    def __init__(self, act: Callable[[str, str], None], folder: Path) -> None:
        super().__init__()
        self.act, self.folder = act, folder
        self.faults: list[BaseException] = []
        self.pages: list[str] = []
        self.ends_at = 0.0

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        self.pages.append(page)
        self.ends_at = ends_at_unix_s
        if len(self.pages) == 1:
            threading.Thread(target=self._act, args=(page,), daemon=True).start()

    def _act(self, page: str) -> None:
        url, _, token = page.partition("#")
        try:
            self.act(url, token)
        except BaseException as fault:
            self.faults.append(fault)
        wishes.send(self.folder, wishes.DESTROY)


def home_of(fake: FakeVast) -> Path:
    """Of the one box."""
    [instance] = fake.instances()
    return fake.home(instance["id"])


def until_gone(fake: FakeVast) -> None:
    assert until(lambda: not fake.instances() or None, every_s=0.05, timeout_s=60)


def ask(url: str, token: str, path: str = "") -> requests.Response:
    return requests.get(url + path, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def told_once(url: str, token: str) -> dict[str, Any]:
    """The stub's answer, once the meter is with it."""
    found = until(lambda: (a := ask(url, token).json()).get("meter") and a, every_s=0.05)
    assert found
    return found


def talk(
    planned: milktea.Planned, own: rig.Rig, vast: milktea.Vast, act: Callable[[str, str], None]
) -> tuple[Talker, milktea.Run]:
    talker = Talker(act, own.runs / planned.plan.run_id)
    run = milktea.rent_and_talk(planned, vast=vast, root=own.runs, screen=talker)
    if talker.faults:
        raise talker.faults[0]
    return talker, run


def test_a_result_is_served_on_a_box_behind_one_port_of_this_machine_and_a_token(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=5, max_usd=0.5, vast=vast, root=own.runs)
    seen: dict[str, Any] = {}

    def act(url: str, token: str) -> None:
        seen.update(told_once(url, token))
        seen["wrong"] = [ask(url, wrong).status_code for wrong in ("", "x" * 43, token[:-1])]
        port = int(url.rstrip("/").rpartition(":")[2])
        seen["bound"] = listening_at(port)
        home = home_of(fake)
        files = {path.name: path for path in home.glob("milktea/*/talk/*")}
        seen["modes"] = {name: oct(path.stat().st_mode & 0o777) for name, path in files.items()}
        seen["named"] = token in commands_of_all()
        seen["journal"] = token in (own.runs / planned.plan.run_id / journal.FILE).read_text()
        seen["data"] = list(home.glob("milktea/*/data/*"))

    talker, run = talk(planned, own, vast, act)
    assert seen["model"] == result.name and seen["base"] == "stub"
    assert seen["bytes"] == result.adapter.stat().st_size
    meter = seen["meter"]
    assert 0 < meter["usd"] < meter["max_usd"] == 0.5 and meter["usd_per_hour"] > 0
    assert 280 < meter["ends_in_s"] <= 300
    assert seen["wrong"] == [401, 401, 401]
    assert seen["bound"] == {"127.0.0.1"}
    assert seen["modes"]["token"] == "0o600" and not seen["named"] and not seen["journal"]
    assert seen["data"] == [], "the rows that were trained on stay at home"
    assert 0 < talker.ends_at - time.time() <= 300
    kinds = [line.kind for line in run.journal]
    assert kinds[-5:] == ["interrupted", "talked", "destroying", "destroyed", "bill"]
    assert run.status().stage == "destroyed" and run.owner == ""


def commands_of_all() -> str:
    """What a process list shows of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    assert any("python" in line for line in found)
    return "\n".join(found)


def listening_at(port: int) -> set[str]:
    """The addresses of this machine at which somebody listens at this port."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address.split(":")[1], 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address.split(":")[0])[::-1]))
    return found


def test_the_port_is_closed_and_the_box_is_gone_once_the_time_is_over(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=3 / 60, vast=vast, root=own.runs)
    talker, run = talk(planned, own, vast, lambda url, token: until_gone(fake))
    url = talker.pages[0].partition("#")[0]
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=60)
    assert [line.kind for line in run.journal][-4:] == ["talked", "destroying", "destroyed", "bill"]
    assert fake.instances() == []


def test_votes_come_home_as_rows_and_what_is_no_row_stays_on_the_box(
    own: rig.Rig, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=5, vast=vast, root=own.runs)

    def act(url: str, token: str) -> None:
        ask(url, token, "vote")

    talk(planned, own, vast, act)
    assert (result.adapter.parent / "feedback.jsonl").read_text() == '{"messages": []}\n'


def test_a_server_that_ends_ends_the_box_and_says_so(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=5, vast=vast, root=own.runs)

    def act(url: str, token: str) -> None:
        with pytest.raises(requests.ConnectionError):
            for _ in range(2):
                ask(url, token, "end")
        until_gone(fake)

    with pytest.raises(Failed, match="the server ended"):
        talk(planned, own, vast, act)
    assert fake.instances() == []


@pytest.mark.parametrize("lie", ["", "[]", '{"api": "http://127.0.0.1:99999999/v1"}', "\\x00\\xff"])
def test_an_address_that_makes_no_sense_ends_the_box_in_words(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found, lie: str
) -> None:
    (own.image / "serve.py").write_text(
        f"import time; open('talk/address', 'w').write({lie!r} or ' '); time.sleep(60)"
    )
    planned = milktea.plan_chat(result, minutes=5, vast=vast, root=own.runs)
    with pytest.raises(Failed, match="makes no sense"):
        milktea.rent_and_talk(planned, vast=vast, root=own.runs)
    assert fake.instances() == []


def test_a_link_that_breaks_is_opened_anew_under_the_same_address(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=5, vast=vast, root=own.runs)
    answers = []

    def act(url: str, token: str) -> None:
        answers.append(ask(url, token).status_code)
        boxes = fake.emulator.boxes.live.values()
        fake.do(lambda: [link.cut() for box in boxes for link in list(box.connections)])
        again = until(lambda: again_of(url, token), every_s=0.1, timeout_s=60)
        answers.append(again)

    def again_of(url: str, token: str) -> int | None:
        try:
            return ask(url, token).status_code
        except requests.ConnectionError:
            return None

    talk(planned, own, vast, act)
    assert answers == [200, 200]


def test_a_conversation_whose_owner_is_gone_is_not_gone_on_with(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=5, vast=vast, root=own.runs)
    pid = os.fork()
    if pid == 0:
        try:
            milktea.rent_and_talk(planned, vast=vast, root=own.runs)
        finally:
            os._exit(0)
    run = milktea.Run(own.runs / planned.plan.run_id)
    try:
        assert until(lambda: serving(run), every_s=0.05, timeout_s=45)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run.owner == "alone" and len(fake.instances()) == 1
    with pytest.raises(JournalError, match="nobody talks any more"):
        milktea.resume(run, vast=vast, root=own.runs)
    assert milktea.destroy(run, vast=vast, root=own.runs)


def serving(run: milktea.Run) -> bool | None:
    lines = run.journal if (run.folder / journal.FILE).exists() else []
    return journal.last(lines, "serving") is not None or None


def test_the_last_run_is_one_that_trained_not_one_that_talked(
    own: rig.Rig, vast: milktea.Vast, result: milktea.Found
) -> None:
    planned = milktea.plan_chat(result, minutes=1 / 60, vast=vast, root=own.runs)
    talk(planned, own, vast, lambda url, token: None)
    assert milktea.find_result("last", root=own.runs).name == result.name


# -- on the run's own box --------------------------------------------------------------------------


def test_a_run_that_asks_for_it_keeps_its_own_box_to_talk_after_the_result_is_home(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    plan = own.plan(talk_s=300.0)
    with Journal(own.runs / plan.run_id) as held:
        held.append("planned", **plan.to_line())
    run = milktea.Run(own.runs / plan.run_id)
    supervisor.start(run.folder, vast)
    seen: list[Any] = []

    def act(url: str, token: str) -> None:
        seen.append((told_once(url, token)["model"], run.adapter is not None, run.status().stage))
        seen.append([choice.wish for choice in run.choices()])
        home = home_of(fake)
        seen.append([path.name for path in home.glob("milktea/launched")])

    talker = Talker(act, run.folder)
    milktea.attach(run, screen=talker)
    assert not talker.faults, talker.faults
    assert seen[0] == (plan.run_id, True, "talking")
    assert seen[1] == [wishes.LEAVE, wishes.DESTROY]
    assert seen[2] == [], "from now on ten silent minutes end the box"
    kinds = [line.kind for line in run.journal]
    assert kinds[kinds.index("pulled") :][-4:] == ["interrupted", "destroying", "destroyed", "bill"]
    assert sum(r["route"] == "create" for r in fake.requests) == 1


def test_a_conversation_that_fails_takes_nothing_of_the_result(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    (own.image / "serve.py").write_text("raise SystemExit('no room on the GPU')")
    outcome, lines, screen = rig.whole_run(own, fake, talk_s=300.0)
    assert outcome.adapter_zip.is_file() and lines[-1].kind == "bill"
    assert any("no room on the GPU" in str(word) for word in screen.told)


# -- in this terminal ------------------------------------------------------------------------------


def test_a_conversation_in_the_terminal_is_carried_byte_by_byte(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, result: milktea.Found
) -> None:
    """Its input is a pipe here: what is typed ends with it."""
    code = (
        "import sys, pathlib, milktea\n"
        "from ops.market.provider import Provider\n"
        "from ops.wait import RealClock\n"
        f"vast = milktea.Vast(Provider({fake.url!r}, {fake.api_key!r}), RealClock({rig.PACE}))\n"
        f"root = pathlib.Path({str(own.runs)!r})\n"
        f"found = milktea.Found({result.name!r}, pathlib.Path({str(result.adapter)!r}))\n"
        "made = milktea.plan_chat(found, vast=vast, root=root)\n"
        "milktea.rent_and_talk(made, vast=vast, root=root, terminal=['--seed=1'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="你好\n".encode(),
        capture_output=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode()
    assert "asked of result/adapter.zip" in said and "you said 你好," in said
    assert fake.instances() == []
