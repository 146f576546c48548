"""Base models: safetensors only, whole, by their hashes, one identity however they are packed."""

import json
import struct

import pytest

from ops.errors import PreflightError
from ops.image.fetch import models as model
from ops.image.spec import lock
from ops.image.spec.definition import ModelSource

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


def test_the_original_llama_layout_is_refused_with_the_command_that_converts_it(folder, tmp_path):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "consolidated.00.pth").write_bytes(b"x")
    (folder / "params.json").write_text("{}")
    with pytest.raises(PreflightError) as caught:
        resolve(folder, tmp_path)
    assert "milktea image convert-llama" in caught.value.hint


def test_pickles_beside_safetensors_do_not_travel(folder, tmp_path):
    found = resolve(folder, tmp_path / "cache")
    assert not any(file.path.endswith((".bin", ".xyz")) for file in found.files)
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_shard_that_broke_off_is_named_with_both_sizes(folder, tmp_path):
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors(128)[:-28])
    with pytest.raises(
        PreflightError,
        match=r"model-00002-of-00002\.safetensors has 172 bytes, its header says 200",
    ):
        resolve(folder, tmp_path)


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
