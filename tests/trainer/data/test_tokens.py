"""A model folder's tokenizer files: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, write_tokenizer

from trainer.data.chat import open_chat
from trainer.data.template import TemplateError
from trainer.data.tokens import chat_text, open_vocabulary

TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def tell(folder: Path, name: str = "tokenizer_config.json", **more: Any) -> None:
    path = folder / name
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | more))


def stock(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"{'eos_token': '</s>'}"),
        ("tokenizer_config.json", b"[]"),
        ("special_tokens_map.json", b"\xff\xfe{}"),
        ("generation_config.json", b"["),
        ("chat_template.jinja", b"{# caf\xe9 #}"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(TemplateError, match=rf"model/{name} is .*: fetch it again"):
        open_vocabulary(folder)


def test_ids_of_stops_that_there_are_not_are_passed_over(folder: Path) -> None:
    tell(folder, "generation_config.json", eos_token_id=[99999, -1, 1 << 40, "x", None, 2])
    assert open_vocabulary(folder).stops == ("</s>",)


def test_a_token_that_only_tokenizer_config_has_is_added_as_transformers_does(folder: Path) -> None:
    told = {"content": "<extra>", "special": True, "lstrip": False, "normalized": False}
    tell(folder, added_tokens_decoder={"300": told, "0": {"content": "<pad>", "special": True}})
    vocabulary, theirs = open_vocabulary(folder), stock(folder)
    for text in ("see <extra> now", "<extra>", "a<pad>b"):
        ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False)
    assert "<extra>" in vocabulary.special_texts and vocabulary.size == len(theirs)


@pytest.mark.parametrize("tail", ["", "\n", "\n\n", "  ", "\n  "])
def test_rows_with_tools_are_written_by_the_template_of_that_name(folder: Path, tail: str) -> None:
    tooled = "\n  {% for t in tools %}{{ t | tojson }}\n{% endfor %}\n" + CHATML
    named = [("tool_use", tooled), ("default", CHATML)]
    told = [{"name": name, "template": text + tail} for name, text in named]
    tell(folder, chat_template=told)
    chat = open_chat(chat_text(folder), open_vocabulary(folder).special_tokens)
    for tools in ([], [TOOL]):
        theirs = stock(folder).apply_chat_template(MESSAGES, tools=tools or None, tokenize=False)
        assert chat.render(MESSAGES, tools, False, None) == theirs


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_processors_chat_template_is_read_where_the_tokenizer_has_none(
    folder: Path, name: str
) -> None:
    tell(folder, name, chat_template="theirs")
    assert chat_text(folder) == CHATML
    tell(folder, chat_template=None)
    assert chat_text(folder) == "theirs"
