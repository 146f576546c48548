"""Base models: safetensors only, whole, by their hashes, one identity however they are packed."""

import json
import os
import struct

import pytest
import torch

from ops.errors import ConfigError, PreflightError
from ops.image import carry
from ops.image.fetch import models as model
from ops.image.spec import lock
from ops.image.spec.definition import ModelSource
from ops.image.spec.paths import Places

INDEX = (
    b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b":'
    b' "model-00002-of-00002.safetensors"}}'
)
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n"


def safetensors(size=64, said=None):
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, said or size]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkout" / "my-model"
    path.mkdir(parents=True)
    for name, data in {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": safetensors(),
        "model-00002-of-00002.safetensors": safetensors(128),
        "model.safetensors.index.json": INDEX,
        "README.md": CARD.encode(),
        "tokenizer.json": b"{}",
        "notes.xyz": b"not taken",
        "training_args.bin": b"a pickle beside safetensors",
    }.items():
        (path / name).write_bytes(data)
    return path


def quiet(line):
    pass


def resolve(folder, cache, **more):
    source = ModelSource(name="mine", source=f"folder:{folder.name}", **more)
    return model.resolve(source, folder.parent, cache, quiet)


def test_a_folder_is_pinned_by_file_with_its_licence(folder, tmp_path):
    found = resolve(folder, tmp_path / "cache")
    assert [file.path for file in found.files] == [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert found.license == "apache-2.0"
    assert found.set_digest == lock.set_digest(list(reversed(found.files)))


def test_the_identity_is_of_the_files_and_not_of_where_they_lie(folder, tmp_path):
    first = resolve(folder, tmp_path / "cache")
    moved = folder.rename(folder.parent / "another-name")
    assert resolve(moved, tmp_path / "cache2").set_digest == first.set_digest
    (moved / "config.json").write_bytes(b"{ }")
    assert resolve(moved, tmp_path / "cache3").set_digest != first.set_digest


def test_weights_that_are_only_pickles_are_refused(folder, tmp_path):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PreflightError, match=r"weights as pickles .*can run code"):
        resolve(folder, tmp_path)


def without_weights(folder):
    for path in (*folder.glob("*.safetensors"), folder / "config.json"):
        path.unlink()


def test_the_original_llama_layout_is_converted_on_the_way_in(folder, tmp_path):
    without_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    sizes = {"tok_embeddings": (8, 4), "output": (8, 4), "norm": (4,)}
    sizes |= {f"layers.0.attention.{x}": (4, 4) for x in ("wq", "wk", "wv", "wo")}
    sizes |= {"layers.0.feed_forward.w1": (6, 4), "layers.0.feed_forward.w3": (6, 4)}
    sizes |= {"layers.0.feed_forward.w2": (4, 6), "layers.0.attention_norm": (4,)}
    sizes |= {"layers.0.ffn_norm": (4,)}
    torch.save(
        {f"{name}.weight": torch.ones(size) for name, size in sizes.items()},
        folder / "consolidated.00.pth",
    )
    params = {"dim": 4, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))
    said = []
    found = model.resolve(
        ModelSource(name="Llama-7B", source=f"folder:{folder}"),
        tmp_path,
        tmp_path / "cache",
        said.append,
    )
    assert [file.path for file in found.files] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert "convert_llama" in said[0]


def test_what_a_converter_refuses_is_told_in_its_own_words(folder, tmp_path):
    without_weights(folder)
    (folder / "config.json").write_text('{"model_type": "chatglm", "position_encoding_2d": true}')
    with pytest.raises(PreflightError, match="ChatGLM-6B, the first, is another model") as caught:
        resolve(folder, tmp_path / "cache")
    assert "ChatGLM2-6B" in caught.value.hint
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_model_that_needs_code_of_its_publisher_is_refused_in_words(folder, tmp_path):
    (folder / "config.json").write_text(
        '{"model_type": "baichuan", "auto_map": {"AutoModel": "modeling_baichuan.Model"}}'
    )
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('a stranger ran')")
    with pytest.raises(PreflightError, match=r"needs code of its publisher \(modeling_baichuan.py"):
        resolve(folder, tmp_path / "cache")


def test_code_that_transformers_does_not_need_is_left_out_and_that_is_said(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "qwen2", "auto_map": {"AutoModel": "m.M"}}')
    (folder / "m.py").write_text("")
    said = []
    source = ModelSource(name="mine", source=f"folder:{folder.name}")
    found = model.resolve(source, folder.parent, tmp_path / "cache", said.append)
    assert "m.py" not in [file.path for file in found.files]
    assert said == ["my-model: m.py stay behind; transformers has qwen2 itself"]


def test_a_model_travels_alone_under_a_name_as_people_write_it(folder, tmp_path):
    folder = folder.rename(folder.parent / "Qwen2.5 7B (ours)")
    places = Places(tmp_path / "checkout")
    made = carry.bundle_model(folder, out=tmp_path / "out", signed=False, places=places)
    plan = (tmp_path / "out/PLAN").read_text().splitlines()
    assert made.kind == "models" and "name models-qwen2.5-7b-ours" in plan
    assert [line.split()[3] for line in plan if line.startswith("model ")] == ["Qwen2.5-7B-ours"]
    assert not (tmp_path / "out/parts").exists() or not list((tmp_path / "out/parts").iterdir())
    assert "for a server that has an image" in (tmp_path / "out/README.en.txt").read_text()
    named = carry.bundle_model(
        folder, "Qwen/Qwen2.5-7B", tmp_path / "out2", signed=False, places=places
    )
    assert named.id == made.id, "one identity by the files"
    with pytest.raises(ConfigError, match="no name of a model"):
        carry.bundle_model(folder, "../etc", tmp_path / "out3", signed=False, places=places)


def test_pickles_beside_safetensors_do_not_travel(folder, tmp_path):
    found = resolve(folder, tmp_path / "cache")
    assert not any(file.path.endswith((".bin", ".xyz")) for file in found.files)
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_shard_that_broke_off_is_named_with_its_size(folder, tmp_path):
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors(128)[:-28])
    with pytest.raises(
        PreflightError,
        match=r"model-00002-of-00002\.safetensors \(172 bytes\) is no whole safetensors file",
    ):
        resolve(folder, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[1]", '"x"', "\ud800"])
def test_json_that_is_none_is_refused_by_its_file(folder, tmp_path, name, text):
    (folder / name).write_text(text, "utf-8", "surrogatepass")
    with pytest.raises(PreflightError, match=f"{name} is no JSON object"):
        resolve(folder, tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", *(f'{{"weight_map": {x}}}' for x in ("[1]", '"x"', "null", '{"a": ["b"]}'))]
)
def test_an_index_that_maps_no_tensors_is_refused_by_its_file(folder, tmp_path, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PreflightError, match=r"model\.safetensors\.index\.json has no weight_map"):
        resolve(folder, tmp_path)


def test_a_shard_outside_of_the_folder_is_not_there(folder, tmp_path):
    (folder.parent / "x.safetensors").write_bytes(safetensors())
    for name in ("../x.safetensors", str(folder.parent / "x.safetensors")):
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(PreflightError, match="which is not there"):
            resolve(folder, tmp_path)


def test_a_model_without_its_fast_tokenizer_is_refused_before_it_travels(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PreflightError, match=r"has no tokenizer\.json") as caught:
        resolve(folder, tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_a_link_out_of_the_folder_carries_no_other_file_away(folder, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("of this machine")
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(PreflightError, match=r"LICENSE is a link to .*id_rsa") as caught:
        resolve(folder, tmp_path / "cache")
    assert "cp -L" in caught.value.hint


def test_a_folder_of_the_hubs_cache_is_taken_with_its_links(folder, tmp_path):
    kept = tmp_path / "models--a--b/snapshots/0123"
    kept.parent.mkdir(parents=True)
    folder.rename(kept)
    (tmp_path / "models--a--b/blobs").mkdir()
    for number, path in enumerate(sorted(kept.iterdir())):
        path.rename(tmp_path / f"models--a--b/blobs/{number}")
        path.symlink_to(f"../../blobs/{number}")
    (kept / "generation_config.json").symlink_to("config.json")
    assert len(resolve(kept, tmp_path / "cache").files) == 7


def test_a_name_that_cannot_travel_is_refused_and_hidden_files_stay(folder, tmp_path):
    (folder / ".cache").mkdir()
    for name in (".cache/x.json", ".hidden.json"):
        (folder / name).write_text("{}")
    assert len(resolve(folder, tmp_path / "cache").files) == 6
    for name in (b"a b.json", b"-x.json", b"\xff.json", b"sub\n.txt"):
        path = folder / os.fsdecode(name)
        path.write_text("{}")
        with pytest.raises(ConfigError, match="cannot travel in a bundle"):
            resolve(folder, tmp_path / "cache")
        path.unlink()


def test_a_missing_shard_is_named(folder, tmp_path):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        PreflightError, match=r"names model-00002-of-00002\.safetensors, which is not there"
    ):
        resolve(folder, tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\x05", b"\xff" * 64, struct.pack("<Q", 9) + b"not json!" + bytes(9)]
)
def test_a_file_that_is_no_safetensors_is_refused(folder, tmp_path, data):
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(PreflightError, match=r"model-00001-of-00002\.safetensors"):
        resolve(folder, tmp_path)


def test_a_hub_model_must_name_its_commit(tmp_path):
    with pytest.raises(PreflightError, match="revision 'main' is not a commit"):
        model.resolve(
            ModelSource(name="m", source="hub:some/model", revision="main"),
            tmp_path,
            tmp_path,
            quiet,
        )


def test_fetching_compares_every_file_with_the_lock(folder, tmp_path):
    found = resolve(folder, tmp_path / "cache")
    assert (
        model.fetch(found, folder.parent, tmp_path / "fresh", quiet) / "tokenizer.json"
    ).read_bytes() == b"{}"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(
        PreflightError, match=r"tokenizer\.json of folder:my-model is not the locked one"
    ):
        model.fetch(found, folder.parent, tmp_path / "fresh2", quiet)


def test_a_damaged_cached_model_is_taken_anew(folder, tmp_path):
    found = resolve(folder, tmp_path / "cache")
    cached = model.where(found, tmp_path / "cache") / "config.json"
    cached.unlink()
    cached.write_bytes(b"damaged")
    model.fetch(found, folder.parent, tmp_path / "cache", quiet)
    assert (model.where(found, tmp_path / "cache") / "config.json").read_bytes() == b"{}"
