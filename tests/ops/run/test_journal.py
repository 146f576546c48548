from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from ops.errors import JournalError
from ops.run import journal
from ops.run.journal import Journal


def filled(folder: Path, lines: int = 5) -> Path:
    with Journal(folder) as j:
        for n in range(lines):
            j.append("note", value=n, text="奶茶")
    return folder


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    lines = journal.read(filled(tmp_path / "run"))
    assert [(line.n, line.kind, line["value"]) for line in lines] == [
        (n, "note", n) for n in range(5)
    ]


def test_a_second_opening_goes_on_after_the_last_line(tmp_path: Path) -> None:
    filled(tmp_path / "run", 2)
    filled(tmp_path / "run", 2)
    assert [line.n for line in journal.read(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [b"", b"{", b"\0" * 40, b"\xff", b"[]", b"null", b'{"n": 1}', b'{"t": 1.0, "kind": "note"}']
    + [b'{"n": 1, "t": {}, "kind": "note"}', b'{"n": 1, "t": 1, "kind": []}', b"[" * 100_000]
    + [b'{"n": 1, "t": 1, "kind": "note", "version": {}}'],
)
def test_a_line_in_the_middle_that_cannot_be_read_is_damage(tmp_path: Path, bad: bytes) -> None:
    path = filled(tmp_path / "run", 3) / journal.FILE
    lines = path.read_bytes().splitlines()
    damaged = b"\n".join([lines[0], bad, lines[2], b""])
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: cannot be read"):
        journal.read(tmp_path / "run")
    with pytest.raises(JournalError), Journal(tmp_path / "run"):
        pass
    assert path.read_bytes() == damaged, "what is there is kept for whoever looks into it"


def test_a_removed_line_is_found(tmp_path: Path) -> None:
    path = filled(tmp_path / "run") / journal.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: cannot be read"):
        journal.read(tmp_path / "run")


def test_a_torn_last_line_never_happened_and_the_next_append_replaces_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 3) / journal.FILE
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    for left in range(last):
        path.write_bytes(whole[: len(whole) - 1 - last + left])
        assert len(journal.read(tmp_path / "run")) == 2, f"{left} bytes of the last line are left"
    with Journal(tmp_path / "run") as j:
        j.append("again")
    assert [line.kind for line in journal.read(tmp_path / "run")] == ["note", "note", "again"]


def test_a_last_line_that_lacks_its_newline_alone_counts_and_gets_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 2) / journal.FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert len(journal.read(tmp_path / "run")) == 2
    with Journal(tmp_path / "run") as j:
        assert path.read_bytes().endswith(b"\n")
        j.append("again")
    assert [line.kind for line in journal.read(tmp_path / "run")] == ["note", "note", "again"]


def test_a_newer_versions_journal_is_refused_by_its_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"n": 0, "t": 1.0, "kind": "planned", "version": journal.VERSION + 1}
    (folder / journal.FILE).write_text(json.dumps(row) + "\n")
    with pytest.raises(JournalError, match="newer milktea"):
        journal.read(folder)


def test_a_second_client_on_the_same_machine_is_kept_out_and_told_who_acts(tmp_path: Path) -> None:
    with Journal(tmp_path / "run") as j:
        j.append("note")
        with pytest.raises(JournalError, match=f"process {os.getpid()}"), Journal(tmp_path / "run"):
            pass
    filled(tmp_path / "run", 1)


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with Journal(tmp_path / "run") as j:
            j.append("note")
            os.write(write_end, b"x")
            signal.pause()
    os.read(read_end, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(journal.read(filled(tmp_path / "run", 1))) == 2


def test_a_client_whose_journal_grew_behind_its_back_is_fenced(tmp_path: Path) -> None:
    with Journal(tmp_path / "run") as j:
        j.append("note")
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(tmp_path / "run", elsewhere)
        filled(elsewhere, 1)  # the other machine's client
        # a shared disk shows its line here
        shutil.copy(elsewhere / journal.FILE, tmp_path / "run" / journal.FILE)
        with pytest.raises(JournalError, match="taken this run over"):
            j.append("note")


def test_a_folder_without_a_journal_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(JournalError) as caught:
        journal.read(tmp_path / "nothing")
    assert "milktea status" in caught.value.hint


def test_a_run_folder_is_its_users_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    with Journal(tmp_path / "run") as j:
        j.append("planned")
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


def test_odd_text_does_not_end_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "run") as j:
        j.append("event", message="\ud800")
    assert [line["message"] for line in journal.read(tmp_path / "run")] == ["\ud800"]
