"""What following a training takes home, waits for and gives up, to the byte and the second: against
the emulator, by a clock that only sleeping moves."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rented import Client, client_of

import rig
from ops.box.connection import Box
from ops.box.scripts import POLL_BYTES
from ops.errors import Failed, Lost, OverBudget, Stalled, Unsuitable
from ops.run import follow as following
from ops.run import retrieve
from ops.run.chain import newest_checkpoint
from ops.run.follow import (
    BAD_MANIFEST,
    EVENTS,
    MAX_LINE,
    NoFirstStep,
    Restarted,
    follow,
    pull_folder,
)
from ops.wait import Patience
from trainer.wire.events import Checkpoint

STEP = b'{"t":1,"event":"step","step":1,"loss":2.0,"learning_rate":0.1,"grad_norm":1.0}\n'
WARNING = b'{"t":1,"event":"warning","message":"%s"}\n'


@pytest.fixture
def client(own: rig.Rig) -> Iterator[Client]:
    with client_of(own, pace=1 / 512) as made:
        made.rent()
        home(made).mkdir(parents=True)
        yield made


@pytest.fixture
def box(client: Client) -> Iterator[Box]:
    made = client.box()
    yield made
    made.end(Lost("the test has ended"))


@pytest.fixture
def state(client: Client) -> following._State:
    (client.session.journal.folder / EVENTS).touch()
    return following._State(Patience(client.clock), Patience(client.clock))


@pytest.fixture
def alive(client: Client) -> Iterator[None]:
    """A trainer that runs."""
    with subprocess.Popen(["sh", "-c", ": exit_code.new; sleep 60; :"]) as trainer:
        (home(client) / "pid").write_text(f"{trainer.pid}\n")
        yield
        trainer.kill()


def home(client: Client) -> Path:
    """The run's folder on the box."""
    [row] = client.fake.instances()
    return client.fake.home(row["id"]) / "milktea" / client.session.run_id


def kept(client: Client) -> Path:
    return client.session.journal.folder / EVENTS


def keep(client: Client, state: following._State, news: bytes, size: int | None = None) -> bool:
    """Give `_keep_events` one answer of a box whose events have `size` bytes."""
    answer = (None, True, len(news) if size is None else size, news)
    box: Any = None  # nothing is asked of it
    return following._keep_events(client.session, box, state, kept(client), answer)


# -- events ----------------------------------------------------------------------------------------


def test_whole_lines_come_home_and_a_half_one_is_asked_for_again(
    client: Client, state: following._State
) -> None:
    assert keep(client, state, STEP + STEP[:9], 2 * len(STEP)) is True, "more is there"
    assert kept(client).read_bytes() == STEP and state.stepped
    assert keep(client, state, STEP[:9], 2 * len(STEP)) is False, "the rest is not written yet"
    assert keep(client, state, STEP, 2 * len(STEP)) is False
    assert kept(client).read_bytes() == 2 * STEP


def test_after_an_empty_line_the_rest_is_asked_for(client: Client, state: following._State) -> None:
    assert keep(client, state, b"\n", 1 + len(STEP)) is True


def test_of_several_stages_the_journal_says_which_one_has_begun(
    client: Client, state: following._State
) -> None:
    row = {"t": 1, "event": "started", "step": 0, "total_steps": 4, "number": 2, "stage": "d" * 99}
    for stages in (1, 2):
        keep(client, state, json.dumps(row | {"stages": stages}).encode() + b"\n")
    one, two = [line for line in client.session.journal.lines if line.get("event") == "started"]
    assert "stages" not in one.data and (two["number"], two["stages"]) == (2, 2)
    assert two["stage"] == "d" * 20


def test_an_event_renews_every_patience(client: Client, state: following._State) -> None:
    client.clock.slept_s += 50.0
    state.still.look()
    state.silent.look()
    assert state.still.seconds == state.silent.seconds == 50.0
    keep(client, state, WARNING % b"x")
    assert (state.still.seconds, state.silent.seconds) == (0.0, 0.0)
    assert client.session.moved_t == client.clock.steady() and not state.stepped


def test_a_long_line_is_asked_for_in_ever_larger_answers(
    client: Client, state: following._State
) -> None:
    size = 10 * MAX_LINE
    assert MAX_LINE == 4 * 1024 * 1024
    for window in (POLL_BYTES, 4 * POLL_BYTES):
        assert state.window == window
        assert keep(client, state, b"x" * (window - 1), size) is False, "not full: more comes later"
        assert state.window == window
        assert keep(client, state, b"x" * window, size) is True
    assert state.window == 16 * POLL_BYTES == MAX_LINE
    assert kept(client).read_bytes() == b""
    assert keep(client, state, b"x" * MAX_LINE, size) is True
    assert kept(client).stat().st_size == MAX_LINE and state.skipping
    assert keep(client, state, b"x" * 9 + b"\n" + STEP, size) is True
    assert not state.skipping and state.stepped and state.window == POLL_BYTES
    assert state.unreadable == 1, "what follows a line that was passed over is read"


def test_the_largest_window_stays_the_largest(client: Client, state: following._State) -> None:
    state.window = MAX_LINE // 2
    keep(client, state, b"x" * state.window, 10 * MAX_LINE)
    assert state.window == MAX_LINE


def test_a_box_may_tell_so_many_bytes_of_events_and_no_more(
    client: Client, state: following._State
) -> None:
    assert keep(client, state, STEP, retrieve.EVENTS_BYTES) is True
    with pytest.raises(Failed, match="it is not taken home"):
        keep(client, state, STEP, retrieve.EVENTS_BYTES + 1)


def test_lines_that_are_no_events_are_told_once(client: Client, state: following._State) -> None:
    for _ in range(2):
        keep(client, state, b"Downloading\n[]\n" + STEP)
    warned = [x for x in client.session.journal.lines if x.get("event") == "warning"]
    assert len(warned) == 1 and state.unreadable == 4


def test_of_a_failure_twenty_samples_are_written_down(
    client: Client, state: following._State
) -> None:
    samples = [f"rows.json:{n}" for n in range(25)]
    row = {"t": 1, "event": "failed", "reason": "odd", "samples": samples}
    keep(client, state, json.dumps(row).encode() + b"\n")
    line = client.session.journal.last("event")
    assert line is not None and line["samples"] == samples[:20]
    assert state.failure is not None and len(state.failure.samples) == 25


# -- patience --------------------------------------------------------------------------------------


def test_before_the_first_step_three_times_the_predicted_time_is_waited(
    client: Client, state: following._State
) -> None:
    session = client.session
    work = replace(session.plan.workload, push_bytes=1e9)
    session.plan = replace(session.plan, stall_s=1.0, workload=work)
    predicted = session.predicted(session.offer())
    state.still.seconds = 3 * (predicted.transfer_s + predicted.start_s)
    assert predicted.start_s > 0 and predicted.transfer_s > 0
    following._enforce(session, state)
    state.still.seconds += 0.001
    with pytest.raises(NoFirstStep):
        following._enforce(session, state)
    session.plan = replace(session.plan, stall_s=7200.0)
    state.still.seconds = 7200.0
    following._enforce(session, state)
    state.still.seconds = 7200.5
    with pytest.raises(NoFirstStep):
        following._enforce(session, state)


def test_after_it_a_silence_as_long_as_the_limit_says(
    client: Client, state: following._State
) -> None:
    state.stepped = True
    state.still.seconds = 600.0
    following._enforce(client.session, state)
    state.still.seconds = 600.5
    with pytest.raises(Stalled, match="no event for 10 minutes"):
        following._enforce(client.session, state)


def test_a_minute_before_the_boxs_end_the_training_is_ended(
    client: Client, state: following._State
) -> None:
    client.clock.slept_s += client.session.left_s() - 60.0
    assert client.session.left_s() == 60.0
    following._enforce(client.session, state)
    client.clock.slept_s += 0.5
    with pytest.raises(OverBudget):
        following._enforce(client.session, state)


def test_a_box_that_is_not_reached_for_its_lease_is_lost_and_no_stall_is_counted(
    client: Client, box: Box, state: following._State, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.show(ssh_port=1, ports={})
    box.endpoints = []
    waited, connect = [], box.connect
    monkeypatch.setattr(
        box, "connect", lambda deadline_s: (waited.append(deadline_s), connect(deadline_s))
    )
    lease_s = 600 * client.clock.pace
    for _ in range(4):
        client.clock.slept_s += lease_s / 4
        assert following._look(client.session, box, state) is None
    assert (state.silent.seconds, state.still.seconds) == (lease_s, 0.0)
    client.clock.slept_s += lease_s / 4
    with pytest.raises(Lost, match="although vast"):
        following._look(client.session, box, state)
    assert waited == [20 * client.clock.pace] * 5, "the limits are looked at between two tries"


def test_without_vast_ais_answer_no_box_is_lost(
    client: Client, box: Box, state: following._State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)
    monkeypatch.setattr("ops.market.client.TRIES", 1)
    box.endpoints = []
    client.fake.faults.add(where="show", what="502_before", times=None)
    for _ in range(6):
        client.clock.slept_s += 600 * client.clock.pace
        assert following._look(client.session, box, state) is None
    assert state.silent.seconds == 0.0


# -- its end ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alive")
def test_a_training_is_asked_every_two_seconds_until_it_ended(client: Client, box: Box) -> None:
    (home(client) / "events.jsonl").write_bytes(STEP)
    client.clock.at[1.0 * client.clock.pace] = lambda: (home(client) / "exit_code").write_text("0")
    follow(client.session, box)
    assert client.clock.slept_s == 2.0 * client.clock.pace
    assert kept(client).read_bytes() == STEP
    line = client.session.journal.last("ended")
    assert line is not None and line["exit_code"] == 0
    assert not (client.session.journal.folder / "log.txt").exists()


def ended(client: Client, box: Box, state: following._State, code: int, log: str) -> Exception:
    (home(client) / "exit_code").write_text(str(code))
    (home(client) / "log.txt").write_text(log)
    with pytest.raises((Failed, Unsuitable)) as error:
        following._look(client.session, box, state)
    line = client.session.journal.last("ended")
    assert line is not None and line["exit_code"] == code
    return error.value


def test_a_training_that_failed_without_a_word_shows_the_last_eight_lines(
    client: Client, box: Box, state: following._State
) -> None:
    log = "".join(f"line {n}\n" for n in range(12))
    error = ended(client, box, state, 1, log)
    assert "line 4\n" in str(error) and "line 3\n" not in str(error)
    assert (client.session.journal.folder / "log.txt").read_text() == log
    assert "milktea logs" in error.hint  # type: ignore[attr-defined]


def test_a_training_that_left_nothing_is_said_to_have(
    client: Client, box: Box, state: following._State
) -> None:
    assert "left no word of why" in str(ended(client, box, state, 2, ""))


def test_the_trainers_own_reason_comes_with_five_of_its_samples(
    client: Client, box: Box, state: following._State
) -> None:
    row = {"t": 1, "event": "failed", "reason": "odd", "samples": list("abcdefg"), "hint": "look"}
    (home(client) / "events.jsonl").write_text(json.dumps(row) + "\n")
    error = ended(client, box, state, 3, "noise")
    assert "exit code 3: odd (rows: a, b, c, d, e)" in str(error) and "noise" not in str(error)
    assert error.hint == "look"  # type: ignore[attr-defined]


def test_a_reason_without_samples_names_no_rows(
    client: Client, box: Box, state: following._State
) -> None:
    row = {"t": 1, "event": "failed", "reason": "odd"}
    (home(client) / "events.jsonl").write_text(json.dumps(row) + "\n")
    assert "rows" not in str(ended(client, box, state, 4, ""))


@pytest.mark.parametrize("log", ["No space left on device", "CUDA: Uncorrectable ECC error"])
def test_a_disk_that_is_full_and_a_gpu_that_died_are_the_machines_fault(
    client: Client, box: Box, state: following._State, log: str
) -> None:
    assert isinstance(ended(client, box, state, 1, log), Unsuitable)


def test_a_trainer_is_gone_when_two_polls_in_a_row_find_none(
    client: Client, box: Box, state: following._State
) -> None:
    (home(client) / "log.txt").write_text("Killed")
    assert following._look(client.session, box, state) is None
    with pytest.raises(Failed, match=r"(?s)gone without an exit code.*Killed"):
        following._look(client.session, box, state)


@pytest.mark.usefixtures("alive")
def test_a_trainer_that_runs_is_not_gone(client: Client, box: Box, state: following._State) -> None:
    state.gone = True
    for _ in range(3):
        assert following._look(client.session, box, state) is None
    assert state.gone is False


def test_a_container_that_is_another_one_was_restarted(
    client: Client, box: Box, state: following._State
) -> None:
    with subprocess.Popen(["sleep", "60"]) as watchdog:
        (home(client).parent / "watchdog.pid").write_text(str(watchdog.pid))
        (home(client) / "container").write_text("1\n")
        state.gone = True
        with pytest.raises(Restarted):
            following._look(client.session, box, state)
        watchdog.kill()


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoint(client: Client, step: int, files: dict[str, bytes]) -> dict[str, Any]:
    """A checkpoint on the box, and its event."""
    folder = home(client) / f"checkpoints/{step}"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in files.items()
    }
    text = json.dumps({"step": step, "files": listed}).encode()
    (folder / "manifest.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    path = f"checkpoints/{step}"
    return {"t": 1, "event": "checkpoint", "step": step, "path": path, "manifest_sha256": digest}


FILES = {"state.bin": b"s" * 100, "a/b/one.bin": b"1", "a/b/two.bin": b""}


@pytest.mark.usefixtures("alive")
def test_the_newest_checkpoint_is_mirrored_and_the_older_ones_go(
    client: Client, box: Box, state: following._State
) -> None:
    session, rows = client.session, []
    mirrored = session.journal.folder / "checkpoints"
    assert newest_checkpoint(session) is None
    for step in (1, 9, 10):
        rows.append(checkpoint(client, step, FILES))
    (home(client) / "checkpoints/9/state.bin").unlink()
    for seen, at in ((rows[:1], 1), (rows, 10)):
        (home(client) / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in seen))
        assert following._look(session, box, state) is None
        assert [p.name for p in mirrored.iterdir()] == [str(at)]
        assert newest_checkpoint(session) == mirrored / str(at)
        for name, data in FILES.items():
            assert (mirrored / str(at) / name).read_bytes() == data
        line = session.journal.last("checkpoint")
        assert line is not None and (line["step"], line["bytes_out"]) == (at, 101)
    told = session.screen.told  # type: ignore[attr-defined]
    assert not any("not mirrored" in str(said) for said in told)
    (mirrored / "11").mkdir()
    assert newest_checkpoint(session) == mirrored / "10", "one that is not whole is none"


@pytest.mark.usefixtures("alive")
def test_a_checkpoint_whose_pull_broke_is_fetched_a_minute_later(
    client: Client, box: Box, state: following._State
) -> None:
    mirrored = client.session.journal.folder / "checkpoints"
    row = checkpoint(client, 3, FILES)
    (home(client) / "events.jsonl").write_text(json.dumps(row) + "\n")
    patience_s = box.patience_s
    client.fake.faults.add(where="exec", what="cut", on_call=2)
    for slept_s, box.patience_s, here in (
        (0, 0.0, []),
        (59, patience_s, []),
        (1, patience_s, ["3"]),
    ):
        client.clock.slept_s += slept_s * client.clock.pace
        assert following._look(client.session, box, state) is None
        assert [path.parent.name for path in mirrored.glob("*/manifest.json")] == here
    asked = len(client.session.journal.lines)
    following._look(client.session, box, state)
    assert len(client.session.journal.lines) == asked, "it is here"


@pytest.mark.usefixtures("alive")
def test_the_next_owner_fetches_the_checkpoint_that_the_last_one_was_told_of(
    client: Client, box: Box
) -> None:
    rows = [{"t": 1, "event": "failed", "reason": "odd"}, checkpoint(client, 3, FILES)]
    for place in (home(client) / "events.jsonl", kept(client)):
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client.clock.at[1.0 * client.clock.pace] = lambda: (home(client) / "exit_code").write_text("1")
    mirrored = kept(client).parent / "checkpoints"
    mirrored.mkdir()
    (mirrored / ".DS_Store").touch()
    for _ in range(2):
        with pytest.raises(Failed, match="exit code 1: odd"):
            follow(client.session, box)
        assert newest_checkpoint(client.session) == mirrored / "3"
    assert client.kinds().count("checkpoint") == 1, "it is fetched once"


def test_a_checkpoint_half_pulled_is_pulled_on(client: Client, box: Box, tmp_path: Path) -> None:
    row = checkpoint(client, 1, FILES)
    remote = f"milktea/{client.session.run_id}/checkpoints/1"
    local = tmp_path / "new/1"
    (local / "a/b").mkdir(parents=True)
    assert pull_folder(box, remote, local, row["manifest_sha256"], max_bytes=101) == 101
    with pytest.raises(ValueError, match="3 files of 101 bytes"):
        pull_folder(box, remote, local, row["manifest_sha256"], max_bytes=100)
    assert not local.exists(), "nothing half is left"


@pytest.mark.parametrize("path", ["checkpoints/4", "../3", "stages/1-other/checkpoints/3"])
def test_a_checkpoint_that_lies_where_no_trainer_writes_is_not_taken_home(
    client: Client, box: Box, path: str
) -> None:
    checkpoint(client, 4, FILES)
    following.mirror(client.session, box, Checkpoint(t=1, step=3, path=path, manifest_sha256="0"))
    told = client.session.screen.told  # type: ignore[attr-defined]
    assert told[-1] == f"the box calls a checkpoint {path!r}: it is not taken home"


def test_a_checkpoint_whose_folder_cannot_be_made_is_told_so(box: Box, tmp_path: Path) -> None:
    (tmp_path / "3").write_text("a file of the user")
    with pytest.raises(FileExistsError):
        pull_folder(box, "milktea/run/checkpoints/3", tmp_path / "3", None, max_bytes=100)
    assert (tmp_path / "3").exists()


def listed(*sizes: int) -> dict[str, Any]:
    return {f"{n}.bin": {"sha256": "0", "bytes": size} for n, size in enumerate(sizes)}


def test_a_manifest_names_at_most_what_this_job_can_have_made() -> None:
    files = following._manifest_files
    assert files({}, 0) == {}
    assert files(listed(0, 7), 7) == {"0.bin": ("0", 0), "1.bin": ("0", 7)}
    assert len(files(listed(*[1] * 1024), 1024)) == 1024
    for bad in (listed(*[1] * 1025), listed(-1, 8), listed(8)):
        with pytest.raises(ValueError, match="the manifest names"):
            files(bad, 7 if len(bad) < 9 else 1 << 20)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x"])
def test_a_manifest_names_no_file_outside_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="outside its folder"):
        following._manifest_files({name: {"sha256": "0", "bytes": 1}}, 9)


@pytest.mark.parametrize("files", [[], {"a": 1}, {"a": {"bytes": 1}}, {"a": {"sha256": 1}}, None])
def test_what_is_no_manifest_is_one_of_the_errors_that_are_told(files: Any) -> None:
    with pytest.raises(BAD_MANIFEST):
        following._manifest_files(files, 9)
