"""ChatGLM2 becomes Qwen2 and Glm; ChatGLM2 written anew, in complex numbers and head by head,
judges the weights, and sentencepiece's rule of merging, written anew, the tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm import LAYERS, forms, quiet, save, their_forward, weights
from sentencepieces import LETTERS, by_the_rule, pieces, write_tokenizer_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trainer import families
from trainer.data.render import examples, prompt
from trainer.data.template import Turn, from_chat_template, load
from trainer.data.tokens import Vocabulary, encode, open_vocabulary, stop_ids
from trainer.model.chatglm import row_order
from trainer.tools import checkpoint
from trainer.tools.checkpoint import InvalidCheckpoint
from trainer.tools.convert_chatglm import convert, read_tokenizer


@pytest.mark.parametrize("ratio", [1, 50, 500])
def test_both_forms_compute_what_chatglm2_computes(tmp_path: Path, ratio: int) -> None:
    w = weights()
    tokens = torch.randint(3, 300, (37,), generator=torch.Generator().manual_seed(1))
    wanted = their_forward(w, tokens, 10000.0 * ratio)
    greedy = tokens[:9]
    for _ in range(8):
        greedy = torch.cat([greedy, their_forward(w, greedy, 10000.0 * ratio)[-1:].argmax(1)])
    for form, folder in forms(tmp_path, rope_ratio=ratio).items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert model.config.model_type == form
        with torch.no_grad():
            found = model(tokens[None]).logits[0]
            assert (found - wanted).abs().max() < 1e-5 and wanted.std() > 0.3, form
            made = model.generate(
                tokens[None, :9],
                attention_mask=torch.ones(1, 9),
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=None,
                use_cache=True,
            )
        assert made[0].tolist() == greedy.tolist(), form


def test_the_way_to_glm_and_the_original_rows_is_exact(tmp_path: Path) -> None:
    w = weights()
    glm = checkpoint.read(forms(tmp_path)["glm"] / "model.safetensors")
    for n in range(LAYERS):
        at, theirs = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            joined = [glm[f"{at}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            assert torch.equal(
                torch.cat(joined), w[f"{theirs}self_attention.query_key_value.{kind}"]
            )
        assert torch.equal(
            glm[f"{at}mlp.gate_up_proj.weight"], w[f"{theirs}mlp.dense_h_to_4h.weight"]
        )
    assert len(glm) == 3 + LAYERS * 11
    assert sorted(row_order(128).tolist()) == list(range(128))
    assert row_order(128)[[0, 1, 32, 64, 96, 127]].tolist() == [0, 2, 64, 1, 65, 127]


def test_a_large_model_comes_in_shards_and_the_trainer_knows_its_family(tmp_path: Path) -> None:
    source = save(tmp_path / "chatglm2-6b", weights())
    shards = convert(source, tmp_path / "out", quiet, shard_bytes=300_000)
    assert len(shards) > 2 and (tmp_path / "out" / checkpoint.INDEX).is_file()
    assert not list((tmp_path / "out").glob("*.py"))
    family = families.read(json.loads((tmp_path / "out/config.json").read_text()))
    assert family.config["model_type"] == "qwen2"


def test_the_tokenizer_merges_as_sentencepiece_does(tmp_path: Path) -> None:
    write_tokenizer_model(tmp_path / "tokenizer.model")
    made = read_tokenizer(tmp_path / "tokenizer.model", roles=False)
    dice = random.Random(9)
    texts = ["".join(dice.choices(LETTERS, k=dice.randrange(40))) for _ in range(2000)]
    texts += ["🙂 emoji", "a  b    c", "\n\n[Round 2]\n\n问：", " leading", "trailing  ", "é\u0301"]
    for text in filter(None, texts):
        if "</s>" in text or "<s>" in text:
            continue
        encoding = made.encode(text, add_special_tokens=False)
        assert encoding.tokens == by_the_rule(text), text
        assert made.decode(encoding.ids) == text


@pytest.mark.parametrize("roles", [False, True])
def test_special_tokens_follow_the_pieces_and_no_text_becomes_one(
    tmp_path: Path, roles: bool
) -> None:
    write_tokenizer_model(tmp_path / "tokenizer.model")
    made = read_tokenizer(tmp_path / "tokenizer.model", roles)
    first = len(pieces())
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "eop"]  # "sop" is a piece of this model
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if roles else []
    assert [made.token_to_id(name) for name in names] == list(range(first, first + len(names)))
    assert (made.token_to_id("<|user|>") is None) is not roles
    for text in ("philosophy", "sop", "eop [MASK]", *(() if roles else ("[gMASK]sop", "<|user|>"))):
        assert max(made.encode(text, add_special_tokens=False).ids) < first, text
    assert made.encode("hi").ids[:2] == [first + 1, first + 3]


def test_transformers_opens_the_tokenizer_of_the_converted_folder(tmp_path: Path) -> None:
    source = save(tmp_path / "chatglm3-6b", weights())
    (source / "tokenization_chatglm.py").write_text('special = ["<|system|>", "<|user|>"]\n')
    convert(source, tmp_path / "out", quiet)
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    convert(tmp_path / "out", tmp_path / "glm", quiet)
    text = "philosophy 好 模型  end"
    for theirs in (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "glm"),
    ):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"][2:]) == text
    assert ours.token_to_id("<|observation|>") == len(pieces()) + 8
    assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)


def their_chat_input(messages: list[dict[str, Any]], query: str) -> list[str]:
    """What ChatGLM3's build_chat_input makes of a history and a question: each message is a role's
    token, its metadata with a line's end, and its text, each encoded for itself."""

    def encoded(text: str) -> list[str]:
        return by_the_rule(text) if text else []

    found = ["[gMASK]", "<sop>"]
    for message in [*messages, {"role": "user", "content": query}]:
        text = message["content"]
        if "tools" in message:
            text += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        metadata = message.get("metadata", "")
        found += [f"<|{message['role']}|>", *encoded(f"{metadata}\n"), *encoded(text)]
    return [*found, "<|assistant|>"]


@pytest.fixture(scope="module")
def chatglm3(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    source = save(tmp_path_factory.mktemp("chatglm3") / "chatglm3-6b", weights())
    (source / "tokenization_chatglm.py").write_text('special = ["<|system|>", "<|user|>"]\n')
    convert(source, source.parent / "out", quiet)
    return open_vocabulary(source.parent / "out")


def test_chatglm3_is_asked_id_by_id_as_its_own_code_asks(chatglm3: Vocabulary) -> None:
    dice = random.Random(3)
    template = from_chat_template(chatglm3.chat_template)
    assert load("chatglm3") == template

    def text() -> str:
        return "".join(dice.choices(LETTERS.replace("\n", "") + "  é🙂", k=dice.randrange(1, 30)))

    for _ in range(60):
        tools = [{"name": "rain", "description": text(), "parameters": {"type": "object"}}]
        tools = tools if dice.random() < 0.3 else []
        theirs, turns = [], []
        if tools or dice.random() < 0.5:
            theirs = [{"role": "system", "content": text()} | ({"tools": tools} if tools else {})]
            turns = [Turn("system", theirs[0]["content"])]
        for _ in range(dice.randrange(4)):
            asked, said = text(), text()
            theirs += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            turns += [Turn("user", asked), Turn("assistant", said)]
        query = text()
        given = [{"type": "function", "function": tool} for tool in tools]
        segments = prompt(
            template, [*turns, Turn("user", query)], chatglm3.special_tokens, tools=given
        )
        ids = encode(chatglm3, template, [segments])[0][0]
        tokens = [chatglm3.tokenizer.id_to_token(i) for i in ids]
        assert tokens == their_chat_input(theirs, query)


def test_chatglm3_learns_to_call_a_tool_and_to_end_where_its_own_code_stops(
    chatglm3: Vocabulary,
) -> None:
    template = from_chat_template(chatglm3.chat_template)
    call = {"function": {"name": "rain", "arguments": {"at": "the sea", "hours": 3}}}
    turns = [
        *(Turn("user", "hi"), Turn("assistant", "好"), Turn("user", "rain")),
        *(Turn("assistant", "so", calls=(call,)), Turn("tool", "no"), Turn("assistant", "dry")),
    ]
    [made] = examples(template, turns, chatglm3.special_tokens, tools=[{"name": "rain"}])
    assert [s.text for s in made.segments if s.trained] == [
        "\n 好<|user|>",
        "\n so<|assistant|>rain\n ```python\ntool_call(at='the sea', hours=3)\n```<|observation|>",
        "\n dry<|user|>",
    ]
    [(ids, trained)] = encode(chatglm3, template, [made.segments])
    first = [chatglm3.tokenizer.id_to_token(i) for i, t in zip(ids, trained, strict=True) if t][:4]
    assert first == ["▁", "<0x0A>", "▁好", "<|user|>"]
    ends = {chatglm3.tokenizer.id_to_token(i) for i in stop_ids(chatglm3, template)}
    assert ends == {"</s>", "<|user|>", "<|observation|>"}
    assert chatglm3.folder is not None
    stock = PreTrainedTokenizerFast.from_pretrained(chatglm3.folder)
    asked = [{"role": "user", "content": "hi sop"}]
    theirs = stock.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert stock.convert_ids_to_tokens(theirs) == their_chat_input([], "hi sop")


def refused(tmp_path: Path, source: Path) -> str:
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(source, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists() and caught.value.hint
    return str(caught.value)


def test_what_is_not_chatglm2_is_refused_in_words(tmp_path: Path) -> None:
    first = save(tmp_path / "chatglm-6b", weights())
    config = json.loads((first / "config.json").read_text()) | {"position_encoding_2d": True}
    del config["multi_query_group_num"]
    (first / "config.json").write_text(json.dumps(config))
    assert "the first, is another model" in refused(tmp_path, first)
    odd = save(tmp_path / "odd", weights(), add_bias_linear=True)
    assert "add_bias_linear = True" in refused(tmp_path, odd)
    glm4 = save(tmp_path / "glm-4-9b", weights())
    (glm4 / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert "no sentencepiece model" in refused(tmp_path, glm4)
    tuned = save(
        tmp_path / "ptuning",
        weights() | {"transformer.prefix_encoder.embedding.weight": torch.ones(2, 2)},
    )
    assert "P-Tuning checkpoint" in refused(tmp_path, tuned)


def test_a_folder_that_is_not_whole_is_refused_in_words(tmp_path: Path) -> None:
    lost = save(tmp_path / "lost", weights())
    (lost / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin, which is not there" in refused(tmp_path, lost)
    w = weights()
    del w["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    holes = save(tmp_path / "holes", w)
    assert "has no transformer.encoder.layers.1.mlp" in refused(tmp_path, holes)
    torn = save(tmp_path / "torn", weights())
    whole = (torn / "pytorch_model-00001-of-00002.bin").read_bytes()
    (torn / "pytorch_model-00001-of-00002.bin").write_bytes(whole[: len(whole) // 2])
    assert "pytorch_model-00001-of-00002.bin is not a whole checkpoint" in refused(tmp_path, torn)
