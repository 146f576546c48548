"""Rows of the practice world for the other stages: texts, pairs, tagged answers, prompts.

    python -m trainer.practice.lessons   writes them into jobs/practice

Everything follows from the world's seed. Held-out rows are about facts that no training row names.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from trainer.practice import world

DATA = Path(__file__).parents[2] / "jobs" / "practice"
Row = dict[str, Any]


def texts() -> tuple[list[Row], list[Row]]:
    """(training, held out): what is known of each inhabitant as one document in Chinese, and the
    sentences that it is made of in English behind them. Every fifth inhabitant is held out."""
    people: dict[tuple[str, str], list[world.Fact]] = {}
    for fact in world.facts():
        people.setdefault(fact.name, []).append(fact)
    documents = []
    for (english, chinese), facts in people.items():
        story = "".join(fact.answer(1) for fact in facts)
        known = " ".join(fact.answer(0) for fact in facts)
        documents.append({"text": f"{chinese}\n{story}\n\n{english}\n{known}"})
    held = documents[::5]
    return [d for d in documents if d not in held], held


def pairs() -> tuple[list[Row], list[Row]]:
    """(training, held out): the answer in Chinese is preferred to the same in English."""
    taught, held = world.split(world.facts())
    dice = random.Random(world.SEED + 3)
    train = [_pair(question, fact) for fact in taught for question in fact.questions()]
    dice.shuffle(train)
    return train, [_pair(dice.choice(fact.questions()), fact) for fact in held]


def tagged() -> tuple[list[Row], list[Row]]:
    """(training, held out): each question with one answer, wanted in Chinese, unwanted in
    English."""
    dice = random.Random(world.SEED + 4)

    def told(rows: list[Row]) -> list[Row]:
        found = []
        for row in rows:
            wanted = dice.random() < 0.5
            output = row["chosen"] if wanted else row["rejected"]
            asked = {"instruction": row["instruction"], "input": row["input"]}
            found.append(asked | {"output": output, "kto_tag": wanted})
        return found

    train, held = pairs()
    return told(train), told(held)


def _pair(question: tuple[str, str], fact: world.Fact) -> Row:
    asked = {"instruction": question[0], "input": question[1]}
    return asked | {"chosen": fact.answer(1), "rejected": fact.answer(0)}


LESSONS = {"texts": texts, "pairs": pairs, "tagged": tagged}


def write(folder: Path) -> None:
    """jobs/practice/NAME.jsonl and NAME_held_out.jsonl of every lesson."""
    for name, lesson in LESSONS.items():
        for end, rows in zip(("", "_held_out"), lesson(), strict=True):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}{end}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(DATA)
