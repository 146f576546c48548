"""Held-out questions at the end of a run: how long an answer may be, and how it is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from results import write_both
from transformers import AutoModelForCausalLM

from trainer.data.formats import Row
from trainer.data.prepare import Prepared, prompt_ids
from trainer.data.template import Turn
from trainer.eval import held_out
from trainer.eval.metrics import chrf
from trainer.result.open import load_model, open_words

CPU = torch.device("cpu")
LONG = "one two three is it, " * 14


def row(answer: str, reasoning: str = "") -> Row:
    asked = Turn("user", "Say one")
    return Row("held.jsonl:1", (asked, Turn("assistant", answer, reasoning=reasoning)))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Prepared]:
    base, adapter = write_both(tmp_path_factory.mktemp("result"))
    return base, load_model(None, base, CPU), open_words(adapter, base)


def test_an_answer_may_be_as_long_as_the_expected_one_and_is_what_transformers_generates(
    opened: tuple[Path, Any, Prepared],
) -> None:
    base, model, data = opened
    asked = held_out.questions([row("it is"), row(" "), row(LONG)], data)
    tokens = [q.tokens for q in asked]
    assert len(asked) == 2 and tokens[0] < held_out.SHORT < 64 < tokens[1]
    assert [q.room for q in asked] == [n + held_out.ROOM for n in tokens]
    found = held_out.answers(model, asked, data, CPU)
    stock = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    for question, answer in zip(asked, found, strict=True):
        ids = torch.tensor([prompt_ids(data, question.row.turns[:-1])])
        settings = {"max_new_tokens": question.room, "do_sample": False, "pad_token_id": 0}
        theirs = stock.generate(ids, **settings, eos_token_id=data.stop_id)[0, ids.shape[1] :]
        words = [token for token in theirs.tolist() if token != data.stop_id]
        assert answer == data.vocabulary.tokenizer.decode(words).strip()


def test_short_answers_must_be_the_same_and_longer_ones_are_alike(
    opened: tuple[Path, Any, Prepared],
) -> None:
    data = opened[2]
    rows = [row("it is"), row("one"), row(LONG), row("two", reasoning="one is it")]
    asked = held_out.questions(rows, data)
    assert [q.short for q in asked] == [True, True, False, False], "no reasoning is the same"
    assert asked[3].expected == "one is it\ntwo"
    before, after = ["", "one", "three", "one"], ["it is", "one", LONG.strip(), "one is it, two"]
    told = held_out.scored(asked, before, after)
    assert (told.rows, told.exact, told.long_rows) == (2, (0.5, 1.0), 2)
    assert told.chrf[1] == chrf(after[2:], [asked[2].expected, asked[3].expected])
    assert told.chrf[0] < 40 < 90 < told.chrf[1] < 100
    assert [s["after"] for s in told.samples] == after


def test_what_is_longer_than_is_decoded_is_compared_up_to_there(
    opened: tuple[Path, Any, Prepared],
) -> None:
    (asked,) = held_out.questions([row(LONG * 20)], opened[2])
    assert asked.room == held_out.LONGEST < asked.tokens
    assert LONG.startswith(asked.expected[:40]) and len(asked.expected) < len(LONG * 20) / 2
