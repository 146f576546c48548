"""Chat templates of models with tokenizers that have their special tokens, and conversations in the
shapes in which people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.template import Template, Turn, from_chat_template
from trainer.data.tokens import Vocabulary, open_vocabulary

TEMPLATES = Path(__file__).parent / "trainer/data/chat_templates"
TODAY = "2024-07-26"  # of every date that a template writes
CORPUS = [
    "You are a helpful assistant.",
    "user assistant system model tool",
    "What is 1 + 2? It is three.",
    "你好，世界。再见！",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "def f(x):\n\treturn x\r\n",
]
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"]
# (special tokens, added tokens that are none, end token, generation_config's end tokens)
KINDS: dict[str, tuple[list[str], list[str], str, list[str]]] = {
    "qwen3": (_QWEN, _THINK, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_5": (_QWEN, _THINK, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_8": (_QWEN, _THINK, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "gemma4": (
        ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]
        + ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>']
        + ["<|tool_response>", "<tool_response|>"],
        [],
        "<eos>",
        ["<eos>", "<turn|>", "<|tool_response>"],
    ),
    "gpt_oss": (
        ["<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
        + ["<|call|>"],
        [],
        "<|return|>",
        ["<|return|>", "<|endoftext|>", "<|call|>"],
    ),
    "glm4moe": (
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
        + ["<|observation|>"],
        _THINK,
        "<|endoftext|>",
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
    ),
    "qwen2_5": (_QWEN, _THINK[2:], "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen2_5_vl": (_QWEN, [], "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_instruct_2507": (_QWEN, _THINK, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_vl": (_QWEN, _THINK, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "phi3": (
        ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        [],
        "<|endoftext|>",
        ["<|endoftext|>", "<|end|>"],
    ),
}
KINDS["phi3_5"] = KINDS["phi3"]

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = {"name": "get_weather", "arguments": {"city": "Kyoto"}}
CALLS = ({"type": "function", "id": "call00001", "function": _CALL},)
RESULT = Turn("tool", "rain", name="get_weather", call_id="call00001")
CONVERSATIONS: dict[str, list[Turn]] = {
    "plain": [
        Turn("user", "Hi there"),
        Turn("assistant", "Hello"),
        Turn("user", "再见"),
        Turn("assistant", "See you\n\nsoon"),
    ],
    "system": [
        Turn("system", "Be terse"),
        Turn("user", "Hi there"),
        Turn("assistant", "Hello"),
        Turn("user", "Bye"),
        Turn("assistant", "See you"),
        Turn("user", "And?"),
        Turn("assistant", "No"),
    ],
    "reasoning": [
        Turn("user", "1+1"),
        Turn("assistant", "two", reasoning="add them"),
        Turn("user", "2+2"),
        Turn("assistant", "four", reasoning="once more"),
    ],
    "tools": [
        Turn("user", "weather?"),
        Turn("assistant", "", calls=CALLS),
        RESULT,
        Turn("assistant", "It rains"),
        Turn("user", "thanks"),
        Turn("assistant", "welcome"),
    ],
    "reasoning and tools": [
        Turn("user", "weather?"),
        Turn("assistant", "", reasoning="look it up", calls=CALLS),
        RESULT,
        Turn("assistant", "It rains", reasoning="say it"),
        Turn("user", "thanks"),
        Turn("assistant", "welcome", reasoning="be polite"),
    ],
    "half of the answers with reasoning": [
        Turn("user", "1+1"),
        Turn("assistant", "two", reasoning="add them"),
        Turn("user", "thanks"),
        Turn("assistant", "welcome"),
    ],
}


def tools_of(kind: str) -> list[Any]:
    return TOOLS if "tools" in kind else []


def write_chat_tokenizer(
    folder: Path,
    chat: str,
    special: list[str],
    plain: list[str] | None = None,
    eos: str = "<|im_end|>",
    stops: list[str] | None = None,
    bos: str = "",
) -> Path:
    """A byte-level BPE of some 400 ids; `stops` are generation_config.json's end tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    for text in plain or []:
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": chat}
    if bos:
        told["bos_token"] = bos
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    if stops:
        ids = [tokenizer.token_to_id(text) for text in stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def write_model_tokenizer(folder: Path, name: str) -> Path:
    """The tokenizer of one of KINDS with its own template; dates in it stand still."""
    special, plain, eos, stops = KINDS[name]
    text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    text = text.replace('strftime_now("%Y-%m-%d")', f"'{TODAY}'")
    bos = next((t for t in special if t in ("<bos>", "<s>")), "")
    return write_chat_tokenizer(folder, text, special, plain, eos, stops, bos)


def opened(folder: Path) -> tuple[Vocabulary, Template]:
    vocabulary = open_vocabulary(folder)
    return vocabulary, from_chat_template(vocabulary.chat_template)


def messages_of(turns: list[Turn], reasoning_key: str) -> list[dict[str, Any]]:
    """The conversation as a server gets it."""
    found = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.reasoning:
            message[reasoning_key] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = list(turn.calls)
        if turn.role == "tool":
            message |= {"name": turn.name, "tool_call_id": turn.call_id}
        found.append(message)
    return found
