"""Conversations in templates in the manner of well known models: the ids of stock transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_world import opened, write_chat_tokenizer
from transformers import PreTrainedTokenizerFast

from trainer.data.render import examples
from trainer.data.template import Turn
from trainer.data.tokens import encode

TALK = [
    Turn("user", "Hi there"),
    Turn("assistant", "Hello"),
    Turn("user", "Bye"),
    Turn("assistant", "See you"),
]
ASK = "{%- if add_generation_prompt -%}"
CHATML_TURN = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
CHATML_ASK = ASK + "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
CHATML = "{%- for m in messages -%}" + CHATML_TURN + "{%- endfor -%}" + CHATML_ASK
# name -> (special tokens, end token, what ends an answer, template)
TEMPLATES = {
    "chatml": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "<|im_end|>",
        "{%- if messages[0].role != 'system' -%}"
        "{{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' -}}{%- endif -%}" + CHATML,
    ),
    "generation": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "<|im_end|>",
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation -%}"
        + CHATML_TURN
        + "{%- endgeneration -%}{%- else -%}"
        + CHATML_TURN
        + "{%- endif -%}{%- endfor -%}"
        + CHATML_ASK,
    ),
    "gemma": (
        ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "<end_of_turn>",
        "{{- bos_token -}}{%- for m in messages -%}"
        "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('turns must alternate') -}}{%- endif -%}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}"
        "{{- m.content | trim -}}{{- '<end_of_turn>\\n' -}}{%- endfor -%}"
        + ASK
        + "{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
    ),
    "mistral": (
        ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
        "</s>",
        "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{{- '[INST]' + m.content + '[/INST]' -}}{%- else -%}{{- m.content + eos_token -}}"
        "{%- endif -%}{%- endfor -%}",
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|eot_id|>",
        "{%- set today = '26 Jul 2024' -%}{{- bos_token -}}"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + today + '<|eot_id|>' -}}"
        "{%- for m in messages -%}"
        "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}"
        "{{- m.content | trim -}}{{- '<|eot_id|>' -}}{%- endfor -%}"
        + ASK
        + "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}",
    ),
}


def tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    special, eos, _, jinja = TEMPLATES[name]
    bos = next((t for t in special if t in ("<bos>", "<s>", "<|begin_of_text|>")), "")
    write_chat_tokenizer(folder, jinja, special, eos=eos, bos=bos)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_one_row_of_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = tokenizer(tmp_path, name)
    vocabulary, template = opened(tmp_path)
    (example,) = examples(template, TALK, vocabulary.special_tokens)
    ((ids, trained),) = encode(vocabulary, template, [example.segments])
    messages = [{"role": t.role, "content": t.text} for t in TALK]
    assert ids == theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    end = TEMPLATES[name][2]
    learned = [i for i, taken in zip(ids, trained, strict=True) if taken]
    assert theirs.decode(learned, skip_special_tokens=False) == f"Hello{end}See you{end}"


def test_each_answer_follows_the_prompt_of_a_server_that_opens_its_reasoning(
    tmp_path: Path,
) -> None:
    """History has no reasoning: in one row, the first answer would follow another prompt."""
    jinja = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
        "{%- if m.role == 'assistant' and loop.last -%}"
        "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}{%- endif -%}"
        "{{- m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
        + ASK
        + "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
    )
    special = TEMPLATES["chatml"][0]
    write_chat_tokenizer(tmp_path, jinja, special, ["<think>", "</think>"])
    vocabulary, template = opened(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    made = examples(template, TALK, vocabulary.special_tokens)
    encoded = encode(vocabulary, template, [e.segments for e in made])
    messages = [{"role": t.role, "content": t.text} for t in TALK]
    for n, (ids, trained) in zip((1, 3), encoded, strict=True):
        start = trained.index(True)
        asked = {"add_generation_prompt": True, "tokenize": True}
        assert ids[:start] == theirs.apply_chat_template(messages[:n], **asked)["input_ids"]
        learned = [i for i, taken in zip(ids, trained, strict=True) if taken]
        said = theirs.decode(learned, skip_special_tokens=False)
        # the block that the prompt opened is closed, empty
        assert said.lstrip("\n") == f"</think>\n\n{TALK[n].text}<|im_end|>"
