"""The command line as a user types it: a process, its exit code, what it says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import needs
from typer.testing import CliRunner

import rig
from ops.cli.app import app
from ops.errors import BoxLeaked
from ops.fakevast import FakeVast
from ops.run.journal import FILE, Journal
from ops.run.rent_and_train import rent_and_train

ROOT = Path(__file__).parents[3]


def milktea(
    *words: str, runs: Path, fake: FakeVast | None = None, key: str | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST")} | {
        "MILKTEA_RUNS": str(runs)
    }
    if fake:
        env |= {"VAST_URL": fake.url, "VAST_API_KEY": key or fake.api_key, "MILKTEA_PACE": "0.002"}
    return subprocess.run(
        [sys.executable, "-m", "ops.cli", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
    )


@pytest.fixture
def finished(own: rig.Rig, fake: FakeVast) -> str:
    """The id of a run that went well."""
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    return plan.run_id


def cpu_seconds(*words: str, runs: Path) -> tuple[float, str]:
    """(processor time of one command, what it printed)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = milktea(*words, runs=runs)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_help_answers_at_once(tmp_path: Path) -> None:
    seconds, said = min(cpu_seconds("--help", runs=tmp_path) for _ in range(3))
    commands = "rent-and-train plan resume reap destroy cost explain status logs export image"
    assert all(f"  {word} " in said for word in commands.split())
    assert seconds < 1.0


@pytest.mark.parametrize("words", [[], ["data"], ["image"], ["adapter"]])
def test_the_list_of_commands_cuts_no_sentence(words: list[str]) -> None:
    told = CliRunner().invoke(app, [*words, "--help"]).output
    assert "Commands:" in told and "..." not in told.split("Commands:")[1]


def test_version_says_what_a_report_needs_without_importing_torch(tmp_path: Path) -> None:
    seconds, said = min(cpu_seconds("--version", runs=tmp_path) for _ in range(3))
    versions = [importlib.metadata.version(package) for package in ("milktea", "torch")]
    assert said.startswith(f"milktea {versions[0]}, Python {platform.python_version()}")
    assert f"torch {versions[1]}" in said and platform.system() in said
    assert seconds < 1.0


def test_status_cost_explain_and_logs_need_no_network(own: rig.Rig, finished: str) -> None:
    for words, expected in {
        ("status",): "done  no box",
        ("cost", finished): "vast.ai's bill for instance",
        ("cost", "--by", "month"): time.strftime("%Y-%m  "),
        ("explain", "last"): "choose    offer",
        ("logs", finished[:-2]): "loss 2",
    }.items():
        done = milktea(*words, runs=own.runs)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout, (words, done.stdout)
    told = milktea("explain", finished, runs=own.runs).stdout
    for word in ("1 x ", "destroy   absent in 3 spaced reads", "pull      verified", "our meter"):
        assert word in told


@pytest.mark.parametrize("words", [("status",), ("cost",), ("explain", "last"), ("logs", "last")])
def test_json_is_one_object_a_line(own: rig.Rig, finished: str, words: tuple[str, ...]) -> None:
    done = milktea(*words, "--json", runs=own.runs)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and done.returncode == 0
    assert finished in done.stdout or words[0] == "logs"


def test_an_unknown_run_is_an_error_that_names_the_next_command(
    own: rig.Rig, finished: str
) -> None:
    done = milktea("explain", "nothing", runs=own.runs)
    assert done.returncode == 8
    assert "'nothing' names 0 runs" in done.stderr and "milktea status" in done.stderr


def test_a_damaged_journal_exits_8_and_names_its_line(own: rig.Rig, finished: str) -> None:
    path = own.runs / finished / FILE
    whole = path.read_bytes()
    number = 1 + next(n for n, text in enumerate(whole.splitlines()) if b'"renting"' in text)
    path.write_bytes(whole.replace(b'"renting"', b'"renting', 1))
    done = milktea("explain", finished, runs=own.runs)
    assert done.returncode == 8
    assert f"{FILE}:{number}: cannot be read" in done.stderr


def test_a_wrong_key_exits_3_and_spends_nothing(own: rig.Rig, fake: FakeVast) -> None:
    done = milktea("plan", "jobs/practice.toml", runs=own.runs, fake=fake, key="wrong")
    assert done.returncode == 3
    assert "does not accept the key" in done.stderr and "nothing was spent" in done.stderr
    # the last line has the code, since make turns each into its own 2
    assert done.stderr.splitlines()[-1].split() == ["code:", "3", "(docs/troubleshooting.md)"]


def test_a_broken_job_file_exits_2_and_lists_what_is_wrong(
    own: rig.Rig, fake: FakeVast, tmp_path: Path
) -> None:
    job = tmp_path / "bad.toml"
    job.write_text('name = "x"\nlearning_rate = 1\n[limits]\nmax_usd = "two"\n')
    done = milktea("rent-and-train", str(job), "--yes", runs=own.runs, fake=fake)
    assert done.returncode == 2
    assert "learning_rate: unknown key; did you mean training.learning_rate?" in done.stderr
    assert "limits.max_usd" in done.stderr and "model: Field required" in done.stderr


def test_an_error_as_json_has_its_three_parts_and_its_code(
    own: rig.Rig, fake: FakeVast, tmp_path: Path
) -> None:
    done = milktea(
        "rent-and-train", str(tmp_path / "none.toml"), "--json", runs=own.runs, fake=fake
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == row["exit_code"] == 2
    assert row["what"] and row["money"] and row["hint"]


def test_reap_on_an_empty_account_says_so(own: rig.Rig, fake: FakeVast) -> None:
    done = milktea("reap", runs=own.runs, fake=fake)
    assert (done.returncode, done.stdout.strip()) == (0, "no box of ours exists")


def test_destroy_of_a_finished_run_has_nothing_to_do(
    own: rig.Rig, fake: FakeVast, finished: str
) -> None:
    done = milktea("destroy", finished, runs=own.runs, fake=fake)
    assert done.returncode == 0 and "has no box; nothing to do" in done.stdout


@pytest.mark.parametrize(
    "words",
    [("plan", "jobs/practice.toml"), ("resume", "last"), ("destroy", "last")],
    ids=lambda w: w[0],
)
def test_a_command_that_acts_first_finishes_a_destroy_that_could_not_be_proven(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("ops.run.absence.DESTROY_PATIENCE_S", 100.0)
    fake.faults.add(where="destroy", what="ignored", times=None)
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j, pytest.raises(BoxLeaked):
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    assert len(fake.instances()) == 1
    fake.faults.clear()
    assert (
        f"{plan.run_id}: destroyed, absent in three spaced reads"
        in milktea(*words, runs=own.runs, fake=fake).stdout
    )
    assert fake.instances() == []


def test_resuming_a_finished_run_names_its_adapter(
    own: rig.Rig, fake: FakeVast, finished: str
) -> None:
    done = milktea("resume", finished, runs=own.runs, fake=fake)
    assert done.returncode == 8 and "is done: its adapter is" in done.stderr


@pytest.mark.slow
def test_make_hides_an_exit_code_that_the_last_lines_say(tmp_path: Path) -> None:
    needs("make")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VAST", "MILKTEA", "MAKE"))}
    done = subprocess.run(
        ["make", "-o", "setup", "resume", "RUN=nosuch", f"VENV={sys.prefix}"],
        cwd=ROOT,
        env=env | {"MILKTEA_RUNS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "code:  8 (docs/troubleshooting.md)" in done.stderr
    assert done.stderr.rstrip().endswith("Error 8")


@pytest.mark.parametrize("module", ["typer", "ops.cli.visit"])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_command_loads_ends_it_without_a_word_or_is_ignored_as_a_shell_said(
    module: str, ignored: bool
) -> None:
    """A shell's `&` in a script ignores it."""
    pressing = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if {ignored} else signal.default_int_handler)
class Pressing:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressing())
sys.argv = ["milktea", "--version"]
from ops.cli.__main__ import main
try:
    main()
finally:
    assert {not ignored} or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    done = subprocess.run(
        [sys.executable, "-c", pressing], cwd=ROOT, capture_output=True, timeout=100
    )
    if ignored:
        assert done.returncode == 0 and done.stdout.startswith(b"milktea "), done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
