"""Labels against TRL's assistant_only_loss, on the templates whose training version writes the
model's own text.

The golden ids and masks are TRL 1.16.0's. To make them anew, in an environment that has TRL:

    PYTHONPATH=.:tests python tests/trainer/data/test_chat_labels.py
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from chat_world import TEMPLATES, opened, write_model_tokenizer

from trainer.data.render import examples
from trainer.data.template import Turn
from trainer.data.tokens import encode

NAMES = ["qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "phi3", "phi3_5"]
GOLDEN = TEMPLATES / "trl_labels.json.gz"
TEXTS = [
    "你好，世界",
    "tab\tand 😀 emoji",
    "line\r\nbreak",
    "two  blanks",
    "a { brace }",
    "Ünïcödé café",
    "two\nlines",
    "<b>bold</b>",
    "1+1=2",
]
BEHIND_STOP = ("\n", "<|endoftext|>")  # what TRL trains behind a stop, or before an answer


def conversations() -> list[list[dict[str, str]]]:
    """24 of one to three rounds, eight of them with a system prompt."""
    made = []
    for n in range(24):
        turns = [{"role": "system", "content": f"Be {TEXTS[n % 9]}"}] if n % 3 == 2 else []
        for k in range(1 + n % 3):
            asked, said = TEXTS[(n + k) % 9], TEXTS[(n + 2 * k + 3) % 9]
            turns.append({"role": "user", "content": f"ask {n} {asked}"})
            turns.append({"role": "assistant", "content": f"say {k} {said}"})
        made.append(turns)
    return made


def trl_labels(folder: Path, training: str) -> list[tuple[list[int], list[int]]]:
    """(ids, assistant mask) of each conversation, as TRL asks transformers for them."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    made = []
    for turns in conversations():
        told = tokenizer.apply_chat_template(
            turns,
            chat_template=training,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        made.append((list(told["input_ids"]), list(told["assistant_masks"])))
    return made


def golden() -> dict[str, list[tuple[list[int], list[int]]]]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_trls_but_for_what_stands_behind_the_stop_token(
    tmp_path: Path, name: str
) -> None:
    vocabulary, template = opened(write_model_tokenizer(tmp_path, name))
    equal = 0
    for turns, (ids, mask) in zip(conversations(), golden()[name], strict=True):
        (example,) = examples(
            template, [Turn(t["role"], t["content"]) for t in turns], vocabulary.special_tokens
        )
        ((ours, trained),) = encode(vocabulary, template, [example.segments])
        assert ours == ids
        differ = [i for i, (a, b) in enumerate(zip(trained, mask, strict=True)) if a != bool(b)]
        assert not any(trained[i] for i in differ), "TRL trains all that we train"
        texts = {vocabulary.tokenizer.decode([ids[i]], skip_special_tokens=False) for i in differ}
        assert texts <= set(BEHIND_STOP)
        equal += 1
    assert equal == 24


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed here")
@pytest.mark.parametrize("name", NAMES)
def test_the_golden_labels_are_those_of_the_trl_that_is_installed(
    tmp_path: Path, name: str
) -> None:
    assert [tuple(x) for x in golden()[name]] == trl_labels(
        write_model_tokenizer(tmp_path, name), training_template(name)
    )


def training_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "chat_templates" / f"{name}_training.jinja"
    return path.read_text("utf-8")


def main() -> int:
    made: dict[str, Any] = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            write_model_tokenizer(Path(folder), name)
            made[name] = trl_labels(Path(folder), training_template(name))
    GOLDEN.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
