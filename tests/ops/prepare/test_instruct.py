"""New rows from seeds, and answers for rows that have none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fake_endpoint import Fake
from typer.testing import CliRunner, Result

from ops.cli.app import app
from trainer.data.records import read


def said(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", "instruct", *map(str, words)])


def word(*of: object) -> str:
    digest = hashlib.blake2b(repr(of).encode()).hexdigest()
    return "".join("abcdefghijklmnop"[int(c, 16)] for c in digest[:40])


def new_rows(content: str) -> list[str] | str:
    """Ten rows of which one repeats a seed, one refuses, one is no row, and seven are new."""
    shown = json.loads(content[content.index("\n[") : content.rindex("]") + 1])
    rows: list[object] = [
        {"instruction": f"Tell {word(content, n)}?", "output": f"It is {word(content, n, 1)}."}
        for n in range(7)
    ]
    refusal = {"instruction": "Who?", "output": "As an AI language model I cannot say."}
    return json.dumps([shown[0], refusal, "no row", *rows])


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    told = [{"instruction": f"Say {word(n)}!", "output": f"{word(n, 0)}."} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    return path


def test_new_rows_are_whole_repeat_no_seed_and_are_as_many_as_were_asked_for(
    seeds: Path, tmp_path: Path
) -> None:
    paid = ["--price-in", "2", "--price-out", "6"]
    with Fake(reply=new_rows) as fake:
        asked = (seeds, "--rows", "20", "--endpoint", fake.url, "--model", "m", *paid)
        priced = json.loads(said(*asked, "--plan", "--json").stdout)
        assert priced["calls"] == 2 and fake.requests == 0
        done = said(*asked, "--max-usd", "1", "--json")
        assert done.exit_code == 0, done.output
        sent = fake.requests
        assert said(*asked, "--max-usd", "1", "--force").exit_code == 0
        assert fake.requests == sent == 3, "a second round for what was left out; then the journal"
    out = tmp_path / "seeds.new.jsonl"
    found = read([out])
    assert len(found.rows) == 20 and not found.defects
    assert len({row.key for row in [*found.rows, *read([seeds]).rows]}) == 32
    removed = json.loads(done.stdout.splitlines()[-1])["removed"]
    assert removed["equal, in the other file"] == 3 and len(removed) == 3


def test_rows_without_an_answer_get_one_and_others_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "ask.jsonl"
    rows = [
        {"instruction": "Who is it?", "input": "the cat"},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}]},
        {"prompt": "bad"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def reply(content: str) -> str:
        return "N/A" if content == "bad" else f"The answer to {content}."

    with Fake(reply=reply) as fake:
        done = said(path, "--answers", "--endpoint", fake.url, "--model", "m", "--json")
        assert done.exit_code == 0, done.output
        assert [b["messages"][0]["role"] for b in fake.bodies].count("system") == 1
    told = [
        json.loads(line)["messages"]
        for line in (tmp_path / "ask.answered.jsonl").read_text("utf-8").splitlines()
    ]
    assert [t[-1]["content"] for t in told] == [
        "The answer to Who is it?\nthe cat.",
        "The answer to ?.",
    ]
    assert list(json.loads(done.stdout.splitlines()[-1])["removed"]) == [
        "no-answer: the answer says nothing"
    ]
    assert said(path, "--answers", "--rows", "3", "--endpoint", "x", "--model", "m").exit_code == 2
