"""GGUF files, read by what we did not write: transformers' reader and tokenizers, and gguf's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import architectures
import pytest
import sentencepieces
import torch
from gguf import GGUFReader
from ggufs import folder_of, model_of
from safetensors.torch import load_file
from tiny import write_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.result import gguf_file
from trainer.tools import sentencepiece_bpe

SIGNS = "What is 1 + 2? It is three. 你好，世界。\n\n\t<|im_end|> <s> é🙂 {}'s don't 12345"


def value_of(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_reads_every_weight_back_as_it_was(tmp_path: Path, kind: str) -> None:
    source = folder_of(tmp_path / "model", kind)
    written = gguf_file.write(source, tmp_path / "model.gguf")
    assert written.largest_error == 0 and written.bytes == (tmp_path / "model.gguf").stat().st_size
    config = AutoModelForCausalLM.from_pretrained(source).config
    if kind == "mistral":  # a Llama by another name, which is how GGUF has it
        config = LlamaConfig.from_dict(config.to_dict() | {"model_type": "llama"})
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    ).state_dict()
    wanted = load_file(source / "model.safetensors")
    for name, value in wanted.items():  # Gemma's norms lose a bit to the 1 that is added
        assert torch.allclose(found[name], value, rtol=0, atol=2e-7), name
    factors = kind == "llama"  # of its stretched positions
    assert written.tensors == len(wanted) + factors


def test_the_settings_are_those_of_the_model(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "gemma2")
    gguf_file.write(source, tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    config = AutoModelForCausalLM.from_pretrained(source).config
    assert value_of(reader, "general.architecture") == "gemma2"
    for key, wanted in {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }.items():
        assert value_of(reader, f"gemma2.{key}") == wanted, key


def test_llama_3s_stretched_positions_are_those_of_transformers(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    gguf_file.write(source, tmp_path / "x.gguf")
    [factors] = [t for t in GGUFReader(tmp_path / "x.gguf").tensors if t.name.startswith("rope")]
    config = AutoModelForCausalLM.from_pretrained(source).config
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2) / head)
    assert torch.allclose(plain / torch.tensor(factors.data), stretched, rtol=1e-5)


def test_q8_0_keeps_each_weight_within_half_a_step(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "qwen2")
    written = gguf_file.write(source, tmp_path / "x.gguf", "q8_0")
    assert 0 < written.largest_error < 0.5 / 127 * 1.01
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_q.bias"] == "F32"


def thousand_texts(signs: str, without: str = "\0") -> list[str]:
    draw, found = random.Random(3), list[str]()
    while len(found) < 1000:
        text = "".join(draw.choices(signs, k=draw.randint(1, 40)))
        found += [text] if without not in text else []
    return found


@pytest.mark.parametrize(
    ("kind", "pre"), [("llama", "llama-bpe"), ("qwen2", "gpt-2"), ("qwen3", "qwen2")]
)
def test_a_thousand_texts_become_the_same_ids(tmp_path: Path, kind: str, pre: str) -> None:
    source = folder_of(tmp_path / "model", kind)
    cuts = [pattern for pattern, name in gguf_file._CUTS.items() if name == pre]
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    if cuts:  # as the tokenizers of Llama 3 and Qwen are published
        split = pre_tokenizers.Split(Regex(cuts[0]), "isolated")
        own.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        own.save(str(source / "tokenizer.json"))
    gguf_file.write(source, tmp_path / "x.gguf")
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    texts = thousand_texts(SIGNS)
    mine = [found.ids for found in own.encode_batch(texts, add_special_tokens=False)]
    assert mine == other(texts, add_special_tokens=False)["input_ids"]
    reader = GGUFReader(tmp_path / "x.gguf")
    assert value_of(reader, "tokenizer.ggml.pre") == pre
    assert len(value_of(reader, "tokenizer.ggml.tokens")) == 320
    assert "im_start" in value_of(reader, "tokenizer.chat_template")


@pytest.mark.parametrize(("kind", "prefix"), [("mistral", "▁"), ("gemma2", "")])
def test_a_thousand_texts_become_the_same_ids_by_sentencepieces(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    source, texts = tmp_path / "model", thousand_texts(sentencepieces.LETTERS + SIGNS, "<s>")
    model = model_of(kind)
    model.resize_token_embeddings(len(sentencepieces.pieces()), mean_resizing=False)
    model.save_pretrained(source)
    sentencepieces.write_tokenizer_model(source / "tokenizer.model", bool(prefix))
    own = sentencepiece_bpe.read(source / "tokenizer.model", [], [], "")
    own.save(str(source / "tokenizer.json"))
    told = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(told))
    gguf_file.write(source, tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    words, scores, kinds = (
        value_of(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    number = {word: n for n, word in enumerate(words)}
    ids = [found.ids for found in own.encode_batch(texts, add_special_tokens=False)]
    # as llama.cpp does, from what the file holds alone
    known = list(zip(words, scores, kinds, strict=True))
    ruled = [sentencepieces.by_the_rule(text, known, prefix) for text in texts]
    assert len(texts) == 1000 and ids == [[number[part] for part in parts] for parts in ruled]
    assert value_of(reader, "tokenizer.ggml.add_space_prefix") == bool(prefix)
    # transformers' reader puts no blank before a text that begins with one
    solid = [text.lstrip(" ") or "a" for text in texts] if prefix else texts
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ids = [found.ids for found in own.encode_batch(solid, add_special_tokens=False)]
    assert ids == other(solid, add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_vocabulary_keeps_its_scores(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    model = import_protobuf().ModelProto()
    for n, (text, kind) in enumerate([("<unk>", 2), ("<0x41>", 6), ("▁a", 1)]):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, -float(n), kind
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    told = (source / "tokenizer.json").read_text()
    text = told.replace('"byte_fallback": false', '"byte_fallback": true')
    (source / "tokenizer.json").write_text(text)
    gguf_file.write(source, tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    assert value_of(reader, "tokenizer.ggml.model") == "llama"
    assert value_of(reader, "tokenizer.ggml.tokens")[2] == "▁a"
    assert value_of(reader, "tokenizer.ggml.scores")[:3] == [0, -1, -2]
    assert value_of(reader, "tokenizer.ggml.token_type")[1] == 3  # an added token stays one


def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    for kind, why in (("gpt2", "is not written"), ("mistral_window", "without the window")):
        source = folder_of(tmp_path / kind, kind)
        with pytest.raises(gguf_file.NoGguf, match=why):
            gguf_file.write(source, tmp_path / "x.gguf")
    architectures.build("gemma3").save_pretrained(tmp_path / "odd")
    write_tokenizer(tmp_path / "odd")
    with pytest.raises(gguf_file.NoGguf, match="other layers"):
        gguf_file.write(tmp_path / "odd", tmp_path / "x.gguf")
    source = folder_of(tmp_path / "cut", "qwen2")
    told = (source / "tokenizer.json").read_text()
    text = told.replace('"add_prefix_space": false', '"add_prefix_space": true')
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(gguf_file.NoGguf, match="way in which this tokenizer cuts"):
        gguf_file.write(source, tmp_path / "x.gguf")
    source = folder_of(tmp_path / "long", "qwen2")
    words = Tokenizer.from_file(str(source / "tokenizer.json"))
    words.add_tokens([f"<extra{n}>" for n in range(40)])
    words.save(str(source / "tokenizer.json"))
    with pytest.raises(gguf_file.NoGguf, match="model has a row for 320"):
        gguf_file.write(source, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
