"""What people thought of answers becomes rows that the trainer reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ops.cli.app import app
from ops.errors import PreflightError
from ops.prepare.feedback import feedback
from trainer.data.records import read
from trainer.serve.feedback import Feedback, rows_of


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def voted(tmp_path: Path) -> Path:
    """Written by the page's own server."""
    page = Feedback(tmp_path / "run")
    for body in (
        {"messages": asked("Tea?"), "answer": "Yes, green.", "liked": True},
        {"messages": asked("Tea?"), "answer": "Go away.", "liked": False},
        {"messages": asked("Milk?"), "answer": "Rude.", "liked": False},
        {"messages": asked("Sugar?"), "answer": "Ten spoons.", "edited": "One spoon."},
        {"messages": asked("Cup?"), "answer": "A large one.", "worse": "None."},
    ):
        page.add(rows_of(body))
    with (tmp_path / "run" / "feedback.jsonl").open("a") as file:
        file.write('[1, 2]\n{"messages": []}\n{"half')
    return tmp_path / "run"


def test_thumbs_edits_and_votes_become_answers_and_pairs(voted: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    talk = [*asked("Saucer?"), {"role": "assistant", "content": "Below the cup."}]
    saved.write_text(json.dumps({"messages": talk}) + "\n", "utf-8")
    done = CliRunner().invoke(
        app, ["data", "feedback", str(voted), str(saved), "--to", str(tmp_path / "mine"), "--json"]
    )
    told = json.loads(done.stdout)
    sft, dpo = tmp_path / "mine.sft.jsonl", tmp_path / "mine.dpo.jsonl"
    assert told["files"] == {str(sft): 3, str(dpo): 3}
    answers = [
        json.loads(line)["messages"][-1]["content"] for line in sft.read_text("utf-8").splitlines()
    ]
    assert answers == ["Yes, green.", "One spoon.", "Below the cup."]
    pairs = [json.loads(line) for line in dpo.read_text("utf-8").splitlines()]
    said = [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]
    assert ("Yes, green.", "Go away.") in said and ("One spoon.", "Ten spoons.") in said
    report = json.loads(Path(told["report"]).read_text("utf-8"))
    assert len([r for r in report["removed"] if "no sound row" in r["reason"]]) == 3
    for path, kind in ((sft, "rows"), (dpo, "pairs")):
        found = read([path])
        assert not found.defects and found.files[str(path)][0] == kind


def test_a_folder_without_a_vote_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"feedback\.jsonl"):
        feedback([tmp_path])
    assert not list(tmp_path.iterdir())
