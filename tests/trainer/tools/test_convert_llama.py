"""The original LLaMA layout becomes what transformers loads; LLaMA as it was written judges."""

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from sentencepieces import by_the_rule, write_tokenizer_model

from ops.image.fetch.models import check
from trainer.data.tokens import open_vocabulary
from trainer.tools.checkpoint import InvalidCheckpoint, read
from trainer.tools.convert_llama import convert

DIM, LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 32, 2, 4, 2, 48, 96
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
CUT = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "tok_embeddings": 1,
    "output": 0,
}


def quiet(line: str) -> None:
    pass


def weights(dtype):
    torch.manual_seed(0)
    kv = DIM // HEADS * KV_HEADS
    shapes = {
        "tok_embeddings.weight": (VOCABULARY, DIM),
        "norm.weight": (DIM,),
        "output.weight": (VOCABULARY, DIM),
    }
    for i in range(LAYERS):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        shapes |= {
            f"{at}.wq.weight": (DIM, DIM),
            f"{at}.wk.weight": (kv, DIM),
            f"{at}.wv.weight": (kv, DIM),
            f"{at}.wo.weight": (DIM, DIM),
        }
        shapes |= {
            f"{ff}.w1.weight": (HIDDEN, DIM),
            f"{ff}.w2.weight": (DIM, HIDDEN),
            f"{ff}.w3.weight": (HIDDEN, DIM),
        }
        shapes |= {
            f"layers.{i}.attention_norm.weight": (DIM,),
            f"layers.{i}.ffn_norm.weight": (DIM,),
        }
    made = {
        name: (1 if "norm" in name else 0) + 0.2 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    return OrderedDict((name, tensor.to(dtype)) for name, tensor in made.items())


def save(folder, tensors, parts=1):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    write_tokenizer_model(folder / "tokenizer.model")
    for part in range(parts):
        cut = OrderedDict()
        for name, tensor in tensors.items():
            axis = next((axis for word, axis in CUT.items() if word in name.split(".")), None)
            cut[name] = tensor if axis is None else tensor.chunk(parts, axis)[part].clone()
        cut["rope.freqs"] = torch.zeros(4).to(tensor.dtype)
        torch.save(cut, folder / f"consolidated.{part:02d}.pth")
    return folder


def meta_forward(weight, tokens):
    """LLaMA as its authors wrote it, in complex numbers: neighbouring pairs of a head's dimensions
    rotate together.
    """
    x, length, size = weight["tok_embeddings.weight"][tokens], len(tokens), DIM // HEADS
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w

    def rotated(x):
        return torch.view_as_real(
            torch.view_as_complex(x.reshape(length, -1, size // 2, 2)) * turn
        ).flatten(2)

    mask = torch.full((length, length), -math.inf).triu(1)
    for i in range(LAYERS):
        at, h = f"layers.{i}.attention", norm(x, weight[f"layers.{i}.attention_norm.weight"])
        q = rotated((h @ weight[f"{at}.wq.weight"].T).reshape(length, HEADS, size))
        k = rotated(
            (h @ weight[f"{at}.wk.weight"].T).reshape(length, KV_HEADS, size)
        ).repeat_interleave(HEADS // KV_HEADS, 1)
        v = (
            (h @ weight[f"{at}.wv.weight"].T)
            .reshape(length, KV_HEADS, size)
            .repeat_interleave(HEADS // KV_HEADS, 1)
        )
        score = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + mask, -1)
        x = x + torch.einsum("hqk,khd->qhd", score, v).flatten(1) @ weight[f"{at}.wo.weight"].T
        h, ff = norm(x, weight[f"layers.{i}.ffn_norm.weight"]), f"layers.{i}.feed_forward"
        gate = torch.nn.functional.silu(h @ weight[f"{ff}.w1.weight"].T) * (
            h @ weight[f"{ff}.w3.weight"].T
        )
        x = x + gate @ weight[f"{ff}.w2.weight"].T
    return norm(x, weight["norm.weight"]) @ weight["output.weight"].T


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_converted_model_computes_what_the_original_computes(tmp_path, parts):
    tensors = weights(torch.float32)
    convert(save(tmp_path / "7B", tensors, parts), tmp_path / "hf", quiet)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.tensor([1, 17, 4, 80, 33, 5, 9])
    with torch.no_grad():
        assert torch.allclose(
            model(tokens[None]).logits[0], meta_forward(tensors, tokens), atol=1e-5
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precisions_keep_every_bit(tmp_path, dtype):
    from safetensors.torch import load_file

    tensors = weights(getattr(torch, dtype))
    shards = convert(save(tmp_path / "7B", tensors), tmp_path / "hf", quiet)
    found = load_file(shards[0])
    assert torch.equal(
        found["model.layers.1.mlp.down_proj.weight"], tensors["layers.1.feed_forward.w2.weight"]
    )
    assert found["lm_head.weight"].dtype == getattr(torch, dtype)
    assert len(found) == len(tensors)


def test_a_large_model_becomes_shards_with_an_index_that_the_model_check_accepts(tmp_path):
    shards = convert(
        save(tmp_path / "7B", weights(torch.float16)), tmp_path / "hf", quiet, shard_bytes=12_000
    )
    assert len(shards) > 2
    assert set(check(tmp_path / "hf")) == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        *(shard.name for shard in shards),
    }


def test_the_tokenizer_is_the_one_of_its_sentencepiece_model_and_begins_with_bos(tmp_path):
    convert(save(tmp_path / "7B", weights(torch.float16)), tmp_path / "hf", quiet)
    found = open_vocabulary(tmp_path / "hf")
    assert (found.bos, found.eos, found.prefix) == ("<s>", "</s>", (1,))
    for text in ("so phil  模型", "🙂 中文\n\nop "):
        assert found.tokenizer.encode(text).tokens == by_the_rule(text)


def test_a_tokenizer_of_another_kind_asks_for_the_hubs(tmp_path):
    folder = save(tmp_path / "original", weights(torch.float16))
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # LLaMA 3's are such lines
    with pytest.raises(InvalidCheckpoint, match="no sentencepiece model") as caught:
        convert(folder, tmp_path / "hf", quiet)
    assert "tokenizer.json" in caught.value.hint and not (tmp_path / "hf").exists()
    (tmp_path / "tokenizer.json").write_text("{}")  # where the hub has it: one folder up
    convert(folder, tmp_path / "hf", quiet)
    assert (tmp_path / "hf/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "params", [[], {"dim": 1e999}, {"n_heads": 0}, {"norm_eps": None}, {"n_heads": 5}]
)
def test_params_json_that_is_no_shape_is_refused_by_name(tmp_path, params):
    folder = save(tmp_path / "7B", weights(torch.float16))
    told = PARAMS | params if params else params
    (folder / "params.json").write_text(json.dumps(told))
    with pytest.raises(InvalidCheckpoint, match=r"params\.json cannot be read"):
        convert(folder, tmp_path / "hf", quiet)


def test_a_pickle_that_names_anything_but_tensors_is_refused_before_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = save(tmp_path / "7B", weights(torch.float16))
    rewritten(folder / "consolidated.00.pth", pickle.dumps({"x": Evil()}, protocol=2))
    with pytest.raises(InvalidCheckpoint, match="its pickle names more than tensors"):
        convert(folder, tmp_path / "hf", quiet)
    assert not (tmp_path / "owned").exists()


def rewritten(path, pickled):
    """The same checkpoint with another pickle."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else data)


def hostile(folder, size, stride, offset):
    """A checkpoint of one tensor, whose pickle says another shape than its 8 bytes have."""
    path = folder / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(2)}, path)

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", 2
            return None

    class Tensor:
        def __reduce__(self):
            shape = (Storage(), offset, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, shape

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"norm.weight": Tensor()})
    rewritten(path, out.getvalue())
    return path


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 35,), (1,), 0),
        ((2,), (1,), 1),
        ((2,), (1 << 40,), 0),
        ((2,), (-1,), 1),
        ((2,), (1,), -1),
        ((-1,), (1,), 0),
        ((2, 2), (0, 1), 0),
    ],
    ids=["long", "shifted", "strided", "backwards", "before", "negative", "overlapping"],
)
def test_a_tensor_that_reaches_outside_of_its_bytes_is_refused(tmp_path, size, stride, offset):
    path = hostile(save(tmp_path / "7B", weights(torch.float16)), size, stride, offset)
    with pytest.raises(InvalidCheckpoint, match=r"consolidated\.00\.pth"):
        read(path)


def test_a_plain_tensor_in_that_form_is_read(tmp_path):
    path = hostile(save(tmp_path / "7B", weights(torch.float16)), (2,), (1,), 0)
    assert torch.equal(read(path)["norm.weight"], torch.ones(2))


def test_a_checkpoint_that_broke_off_is_named(tmp_path):
    folder = save(tmp_path / "7B", weights(torch.float16))
    whole = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.00.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidCheckpoint, match=r"consolidated\.00\.pth is not a whole checkpoint"):
        convert(folder, tmp_path / "hf", quiet)


def test_a_folder_without_a_checkpoint_says_which_folder_to_name(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(tmp_path, tmp_path / "hf", quiet)
    assert "7B" in caught.value.hint
