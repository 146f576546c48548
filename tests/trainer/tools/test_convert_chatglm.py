"""ChatGLM2 becomes Qwen2 and Glm; ChatGLM2 written anew, in complex numbers and head by head,
judges the weights, and sentencepiece's rule of merging, written anew, the tokenizer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepieces import LETTERS, by_the_rule, pieces, write_tokenizer_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trainer import families
from trainer.tools import checkpoint
from trainer.tools.checkpoint import InvalidCheckpoint
from trainer.tools.convert_chatglm import convert, read_tokenizer, row_order

HIDDEN, LAYERS, HEADS, GROUPS, SIZE, WIDE = 96, 3, 6, 2, 16, 160
THEIRS: dict[str, Any] = {
    "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": WIDE,
    "hidden_size": HIDDEN,
    "kv_channels": SIZE,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": GROUPS,
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "torch_dtype": "float32",
}


def quiet(line: str) -> None:
    pass


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows, qkv = len(pieces()) + 20, (HEADS + 2 * GROUPS) * SIZE
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (rows, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (rows, HIDDEN),
    }
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attention.query_key_value.weight": (qkv, HIDDEN),
            f"{at}self_attention.query_key_value.bias": (qkv,),
            f"{at}self_attention.dense.weight": (HIDDEN, HEADS * SIZE),
            f"{at}mlp.dense_h_to_4h.weight": (2 * WIDE, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, WIDE),
        }
    return {
        name: (1 if "norm" in name else 0) + (0.3 if "bias" in name else 0.12) * torch.randn(shape)
        for name, shape in shapes.items()
    }


def save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as the hub has it: two pickles with an index, remote code, sentencepiece."""
    folder.mkdir()
    rows = len(tensors["transformer.output_layer.weight"])
    text = json.dumps(THEIRS | {"padded_vocab_size": rows} | config)
    (folder / "config.json").write_text(text)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('a stranger ran')\n")
    write_tokenizer_model(folder / "tokenizer.model")
    where = {}
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        held = {name: tensors[name].clone() for name in part}
        if number == 1:
            held["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
        torch.save(held, folder / file)
        where |= dict.fromkeys(held, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def their_forward(w: dict[str, Tensor], tokens: Tensor, theta: float) -> Tensor:
    """ChatGLM2's logits (tokens, vocabulary): head by head, turned in complex numbers."""
    x, length = w["transformer.embedding.word_embeddings.weight"][tokens], len(tokens)
    turned = SIZE // 2
    angle = torch.outer(
        torch.arange(length).double(),
        theta ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned),
    )
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(head: Tensor) -> Tensor:
        pairs = torch.complex(head[:, 0:turned:2], head[:, 1:turned:2]) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(1), head[:, turned:]], 1)

    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        h = norm(x, w[f"{at}input_layernorm.weight"])
        mixed = h @ w[f"{at}self_attention.query_key_value.weight"].T
        mixed = mixed + w[f"{at}self_attention.query_key_value.bias"]
        q, k, v = mixed.split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE], 1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            own, shared = (
                slice(head * SIZE, head * SIZE + SIZE),
                slice(group * SIZE, (group + 1) * SIZE),
            )
            score = rotated(q[:, own]) @ rotated(k[:, shared]).T / math.sqrt(SIZE)
            heads.append(score.masked_fill(later, -math.inf).softmax(1) @ v[:, shared])
        x = x + torch.cat(heads, 1) @ w[f"{at}self_attention.dense.weight"].T
        h = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{at}mlp.dense_h_to_4h.weight"].T).split(WIDE, 1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{at}mlp.dense_4h_to_h.weight"].T
    return norm(x, w["transformer.encoder.final_layernorm.weight"]) @ (
        w["transformer.output_layer.weight"].T
    )


def forms(tmp_path: Path, **config: Any) -> dict[str, Path]:
    """Qwen2 from the pickles, and Glm from that."""
    convert(save(tmp_path / "chatglm2-6b", weights(), **config), tmp_path / "qwen2", quiet)
    convert(tmp_path / "qwen2", tmp_path / "glm", quiet)
    return {"qwen2": tmp_path / "qwen2", "glm": tmp_path / "glm"}


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
    for text in ("philosophy", "[gMASK]sop", "sop", "eop [MASK]", "<|user|>"):
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
