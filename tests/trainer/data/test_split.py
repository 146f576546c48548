"""Long conversations become several: what is learned of them is what stock rendering of each piece
says, every answer once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import write_tokenizer
from transformers import AutoTokenizer

from trainer.data.errors import InvalidJob
from trainer.data.formats import Row
from trainer.data.split import rounds_of, split_long
from trainer.data.template import Turn, from_chat_template
from trainer.data.tokenised import tokenise
from trainer.data.tokens import open_vocabulary
from trainer.wire.job import Data

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LIMIT = 96


def talk(rounds: int, words: int = 3, system: str = "be kind") -> tuple[Turn, ...]:
    turns = [Turn("system", system)] if system else []
    for n in range(rounds):
        turns += [Turn("user", f"ask {n}"), Turn("assistant", f"say {n} " * words + "end")]
    return tuple(turns)


def settings(**changes: Any) -> Data:
    told = {"files": [], "max_length": LIMIT, "over_length": "split", "template": "chat"}
    return Data.model_validate(told | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made, chat_template=CHAT)
    return made


def stock_pieces(stock: Any, turns: tuple[Turn, ...]) -> list[tuple[list[int], list[bool]]]:
    """(ids, what is learned) of each piece by transformers alone: rounds are added as long as they
    fit."""
    head = [{"role": t.role, "content": t.text} for t in turns if t.role == "system"]
    rest = [{"role": t.role, "content": t.text} for t in turns if t.role != "system"]
    made: list[tuple[list[int], list[bool]]] = []
    kept: list[dict[str, str]] = []

    def rendered(messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        told = stock.apply_chat_template(
            [*head, *messages], return_dict=True, return_assistant_tokens_mask=True
        )
        return told["input_ids"], [bool(m) for m in told["assistant_masks"]]

    for n in range(0, len(rest), 2):
        if kept and len(rendered([*kept, *rest[n : n + 2]])[0]) > LIMIT:
            made.append(rendered(kept))
            kept = []
        kept += rest[n : n + 2]
    return [*made, rendered(kept)]


@pytest.mark.parametrize("system", ["", "be kind"])
def test_every_piece_is_what_stock_rendering_says_of_it(folder: Path, system: str) -> None:
    stock, vocabulary = AutoTokenizer.from_pretrained(folder), open_vocabulary(folder)
    template = from_chat_template(vocabulary.chat_template)
    rows = [Row("a:1", talk(12, system=system)), Row("a:2", talk(1, system=system))]
    found = tokenise(rows, vocabulary, template, settings())
    parts = [slice(a, b) for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
    ours = [(found.ids[p].tolist(), found.trained[p].tolist()) for p in parts]
    assert ours == [piece for row in rows for piece in stock_pieces(stock, row.turns)]
    assert len(ours) > 3 and max(found.lengths) <= LIMIT
    pieces = len(ours) - 1
    assert found.summary[0].startswith(
        f"1 conversations of more than data.max_length became {pieces}"
    )


def test_a_round_that_is_too_long_is_left_out_and_told(folder: Path) -> None:
    vocabulary = open_vocabulary(folder)
    template = from_chat_template(vocabulary.chat_template)
    long = (*talk(2), Turn("user", "go on"), Turn("assistant", "on and on " * 40), *talk(2)[1:])
    found = tokenise([Row("a:1", long)], vocabulary, template, settings())
    assert len(found) >= 2 and max(found.lengths) <= LIMIT
    assert [note.split(":")[0] for note in found.notes] == ["a"]
    assert "dropped" in found.notes[0]
    with pytest.raises(InvalidJob, match="cannot be trained on") as told:
        tokenise([Row("a:1", long)], vocabulary, template, settings(over_length="refuse"))
    assert '"split" (conversations)' in told.value.hint


def test_a_piece_begins_where_a_user_speaks_and_keeps_what_tools_answered() -> None:
    turns = (
        Turn("system", "s"),
        Turn("assistant", "hello"),
        Turn("user", "weather?"),
        Turn("assistant", "", calls=({"name": "look"},)),
        Turn("tool", "rain"),
        Turn("assistant", "rain"),
        Turn("user", "thanks"),
        Turn("assistant", "welcome"),
    )
    preamble, rounds = rounds_of(turns)
    assert [t.role for t in preamble] == ["system"]
    assert [[t.role for t in part] for part in rounds] == [
        ["assistant"],
        ["user", "assistant", "tool", "assistant"],
        ["user", "assistant"],
    ]


def test_splitting_is_greedy_and_asks_for_few_lengths() -> None:
    asked: list[int] = []

    def lengths(rows: Any) -> list[int]:
        asked.append(len(rows))
        return [10 * sum(t.role == "user" for t in row.turns) + 3 for row in rows]

    rows = [Row("a:1", talk(20, words=9)), Row("a:2", talk(3))]
    found, split, pieces = split_long(rows, lengths, 70)
    sizes = [sum(t.role == "user" for t in row.turns) for row in found]
    assert sizes == [6, 6, 6, 2, 3] and (split, pieces) == (1, 4)
    assert all(row.turns[0].role == "system" for row in found)
    assert len(asked) < 25


def test_what_is_compared_or_learned_at_the_end_is_not_split() -> None:
    with pytest.raises(ValueError, match='no place for train_on = "last"'):
        settings(train_on="last")
