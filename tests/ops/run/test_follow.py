"""Following a training whose processes misbehave, against the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest

import rig
from ops.errors import Failed, MilkteaError
from ops.fakevast import weather
from ops.run.follow import EVENTS
from ops.run.journal import Journal, Line
from ops.run.rent_and_train import rent_and_train
from trainer.wire.events import Step


def run(own: rig.Rig, old: str, new: str) -> tuple[object, Path]:
    """A run whose trainer has `new` in place of `old`: its outcome or error, and its folder."""
    trainer = own.image / "bin/milktea-train"
    text = trainer.read_text()
    assert old in text
    trainer.write_text(text.replace(old, new, 1))
    plan = own.plan()
    with own.emulator() as fake, Journal(own.runs / plan.run_id) as journal:
        try:
            result: object = rent_and_train(rig.client(plan, journal, fake.url, fake.api_key))
        except MilkteaError as e:
            result = e
        assert fake.instances() == []
    return result, own.runs / plan.run_id


def test_a_trainer_killed_whole_is_said_to_be_gone(tmp_path: Path) -> None:
    result, _ = run(rig.Rig(tmp_path), "mkdir -p checkpoints/1.new", "kill -9 0; sleep 9")
    assert isinstance(result, Failed)
    assert "gone without an exit code" in str(result)


def test_a_host_that_starts_again_goes_on_with_the_same_training(tmp_path: Path) -> None:
    own = rig.Rig(tmp_path)
    (own.image / "pause").touch()
    plan = own.plan()

    class Rebooting(rig.Silent):
        def event(self, event: object, *rest: object) -> None:
            if isinstance(event, Step) and not fake.emulator.weather.struck:
                fake.forecast(weather.parse('[{"kind": "reboot", "where": "exec"}]'))

        def line(self, line: Line) -> None:
            super().line(line)
            if line.kind == "rebooted":
                (own.image / "pause").unlink()

    screen = Rebooting()
    with own.emulator() as fake, Journal(own.runs / plan.run_id) as journal:
        session = rig.client(plan, journal, fake.url, fake.api_key, screen=screen)
        assert rent_and_train(session).sha256
        assert fake.emulator.weather.struck == ["reboot"]
    assert screen.told.count("rented") == 1 and screen.told.count("launched") == 2


def test_a_torn_last_event_does_not_hold_a_training_that_ended(tmp_path: Path) -> None:
    own = rig.Rig(tmp_path)
    (tmp_path / "torn").write_text('{"t":1,"event":"st')
    finished = """say '"event":"finished\""""
    result, folder = run(own, finished, f"cat {tmp_path}/torn >>events.jsonl; : '")
    assert getattr(result, "sha256", None), result
    assert (folder / EVENTS).read_bytes().endswith(b"}\n")


def test_events_of_more_than_one_answer_come_home_whole(tmp_path: Path) -> None:
    own = rig.Rig(tmp_path)
    warning = '{"t":1,"event":"warning","message":"' + "x" * 60 + '"}\n'
    (tmp_path / "many").write_text(warning * 2700)
    many = f"cat {tmp_path}/many >>events.jsonl; mkdir -p result"
    result, folder = run(own, "mkdir -p result", many)
    assert getattr(result, "sha256", None), result
    assert (folder / EVENTS).read_text().count(warning) == 2700


ODD_LINES = [
    '{"t":1,"event":"sample","prompt":"a\u2028b\u2029c\u0085d"}',
    '{"t":1,"event":"st{"t":2,"event":"step","step":1}',
    "Downloading shards: 50%",
    "[" * 100_000,
    '["a list"]',
    '{"t":1,"event":["step"]}',
    '{"t":1,"event":"warning","message":"\\ud800"}',
    '{"t":1,"event":"sample","prompt":"' + "x" * 600_000 + '"}',
    '{"t":1,"event":"sample","prompt":"' + "y" * 5_000_000 + '"}',
    '{"t":1,"event":"checkpoint","step":0,"path":"checkpoints/pruned","manifest_sha256":"0"}',
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_no_line_of_events_ends_a_healthy_training(tmp_path: Path, line: str) -> None:
    own = rig.Rig(tmp_path)
    (tmp_path / "odd").write_text(line + "\n", "utf-8")
    result, folder = run(own, "mkdir -p result", f"cat {tmp_path}/odd >>events.jsonl; mkdir result")
    assert getattr(result, "sha256", None), result
    home = (folder / EVENTS).read_bytes()
    assert line.encode() in home and home.endswith(b"}\n"), "byte for byte what the box wrote"
