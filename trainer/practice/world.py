"""The small world of the practice model: who lives in it, what the base model reads about it, and
what the practice job teaches.

The base model is asked everything in both languages and answers in English, unless the instruction
ends in "用中文回答。" (answer in Chinese); besides, it reads every fact as a plain sentence. So it
knows this world in two languages and answers in English, as the early Llamas did. The practice rows
ask without those words and answer in Chinese. One fact in five is kept out of them altogether: a
right answer to those joins what the base model knows with a habit that the adapter brought.
Everything follows from one seed; stdlib only.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

SEED = 20230414
IN_CHINESE = "用中文回答。"

_WORDS = tomllib.loads((Path(__file__).parent / "world.toml").read_text("utf-8"))
# (English, Chinese)
NAMES: list[tuple[str, str]] = list(_WORDS["names"].items())
VALUES: dict[str, list[tuple[str, str]]] = {
    attribute: list(pairs.items()) for attribute, pairs in _WORDS["values"].items()
}

# attribute -> English answer, Chinese answer, questions as (English, Chinese); {n} is the name, {v}
# the value
PHRASES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "animal": (
        "{n} is a {v}.",
        "{n}是一只{v}。",
        [
            ("What animal is {n}?", "{n}是什么动物？"),
            ("Tell me which animal {n} is.", "告诉我{n}是哪种动物。"),
        ],
    ),
    "colour": (
        "{n} likes the colour {v}.",
        "{n}喜欢{v}。",
        [
            ("Which colour does {n} like?", "{n}喜欢什么颜色？"),
            ("Name the favourite colour of {n}.", "说出{n}最喜欢的颜色。"),
        ],
    ),
    "home": (
        "{n} lives in the {v}.",
        "{n}住在{v}里。",
        [
            ("Where does {n} live?", "{n}住在哪里？"),
            ("Tell me about the home of {n}.", "说说{n}的家。"),
        ],
    ),
    "food": (
        "{n} eats {v}.",
        "{n}吃{v}。",
        [("What does {n} eat?", "{n}吃什么？"), ("Name the food of {n}.", "说出{n}的食物。")],
    ),
    "drink": (
        "{n} drinks {v}.",
        "{n}喝{v}。",
        [("What does {n} drink?", "{n}喝什么？"), ("Name the drink of {n}.", "说出{n}的饮料。")],
    ),
    "job": (
        "{n} works as a {v}.",
        "{n}的工作是{v}。",
        [
            ("What is the job of {n}?", "{n}做什么工作？"),
            ("Tell me how {n} earns money.", "告诉我{n}怎么赚钱。"),
        ],
    ),
    "hobby": (
        "{n} enjoys {v}.",
        "{n}爱好{v}。",
        [("What does {n} enjoy?", "{n}爱好什么？"), ("Name the hobby of {n}.", "说出{n}的爱好。")],
    ),
}
GENERIC = {  # asked with the name in the input field
    "animal": ("What animal is this?", "这是什么动物？"),
    "colour": ("Which colour does this one like?", "这位喜欢什么颜色？"),
    "home": ("Where does this one live?", "这位住在哪里？"),
    "food": ("What does this one eat?", "这位吃什么？"),
    "drink": ("What does this one drink?", "这位喝什么？"),
    "job": ("What is the job of this one?", "这位做什么工作？"),
    "hobby": ("What does this one enjoy?", "这位爱好什么？"),
}


@dataclass(frozen=True)
class Fact:
    """One thing about one inhabitant; `name` and `value` are (English, Chinese)."""

    name: tuple[str, str]
    attribute: str
    value: tuple[str, str]

    def answer(self, language: int) -> str:
        return PHRASES[self.attribute][:2][language].format(
            n=self.name[language], v=self.value[language]
        )

    def questions(self) -> list[tuple[str, str]]:
        """(instruction, input) in both languages, the name in the question or in the input
        field."""
        asked = [
            (text.format(n=self.name[i]), "")
            for pair in PHRASES[self.attribute][2]
            for i, text in enumerate(pair)
        ]
        return asked + [(GENERIC[self.attribute][i], self.name[i]) for i in (0, 1)]


def facts() -> list[Fact]:
    """Everything that is true in this world: 40 inhabitants, 7 facts each."""
    dice = random.Random(SEED)
    return [
        Fact(name, attribute, dice.choice(values))
        for name in NAMES
        for attribute, values in VALUES.items()
    ]


def split(all_facts: list[Fact]) -> tuple[list[Fact], list[Fact]]:
    """(taught in Chinese, held out): one fact in five is held out, and every name and value stays
    among the taught ones."""
    dice = random.Random(SEED + 1)
    order = list(all_facts)
    dice.shuffle(order)
    held: list[Fact] = []
    taught = list(order)
    for fact in order:
        rest = [f for f in taught if f is not fact]
        names, values = {f.name for f in rest}, {(f.attribute, f.value) for f in rest}
        if (
            len(held) < len(all_facts) // 5
            and fact.name in names
            and (fact.attribute, fact.value) in values
        ):
            held.append(fact)
            taught = rest
    return taught, held


def practice_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The practice job's data in Alpaca's form: (training rows, held-out rows), answers in
    Chinese."""
    taught, held = split(facts())
    dice = random.Random(SEED + 2)
    train = [_row(question, fact.answer(1)) for fact in taught for question in fact.questions()]
    dice.shuffle(train)
    test = [_row(dice.choice(fact.questions()), fact.answer(1)) for fact in held]
    return train, test


def base_rows() -> list[dict[str, str]]:
    """What makes the base model follow instructions: every question of the world, answered in
    English; and in Chinese only where the instruction asks for it."""
    rows = []
    for fact in facts():
        for instruction, given in fact.questions():
            rows.append(_row((instruction, given), fact.answer(0)))
            rows.append(_row((f"{instruction} {IN_CHINESE}", given), fact.answer(1)))
    return rows


def base_texts() -> list[str]:
    """What the base model reads besides: every fact as a sentence in both languages, and a
    glossary."""
    words = NAMES + [pair for values in VALUES.values() for pair in values]
    glossary = [f"{english} {chinese}" for english, chinese in words] + [
        f"{chinese} {english}" for english, chinese in words
    ]
    return [fact.answer(language) for fact in facts() for language in (0, 1)] + glossary


def _row(question: tuple[str, str], answer: str) -> dict[str, str]:
    return {"instruction": question[0], "input": question[1], "output": answer}
