"""ops/run/result.py over real PEFT adapters: the clean ones pass, every planted corruption is
caught and named.

Two kinds: damage on the way (the manifest is honest), and a box that lies (archive and manifest
agree with each other).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops.errors import AdapterError
from ops.run.expected import CONFIG, WEIGHTS, ExpectedResult
from ops.run.result import verify

BASE = "practice/tiny-llama"
DATA = ("a" * 64, "b" * 64)
TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def listed(members: dict[str, bytes]) -> dict[str, Any]:
    return {
        n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in members.items()
    }


@dataclass
class Adapter:
    """An adapter in parts, so that a test can spoil one of them and put it together again."""

    members: dict[str, bytes]
    expect: ExpectedResult
    manifest: dict[str, Any] = field(default_factory=dict)

    def header(self) -> tuple[dict[str, Any], bytes]:
        blob = self.members[WEIGHTS]
        length = struct.unpack("<Q", blob[:8])[0]
        return json.loads(blob[8 : 8 + length]), blob[8 + length :]

    def set_weights(self, header: dict[str, Any], body: bytes) -> None:
        text = json.dumps(header).encode()
        self.members[WEIGHTS] = struct.pack("<Q", len(text)) + text + body

    def config(self) -> dict[str, Any]:
        return json.loads(self.members[CONFIG])

    def zip(self, **settings: Any) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", settings.get("how", zipfile.ZIP_DEFLATED)) as archive:
            for name, data in self.members.items():
                archive.writestr(name, data)
        return out.getvalue()

    def seal(self, archive: bytes | None = None, members: dict[str, bytes] | None = None) -> bytes:
        """Makes the manifest agree with whatever the members are now: the box lies consistently."""
        data = self.zip() if archive is None else archive
        header, _ = self.header()
        self.manifest = {
            "wire": 2,
            "run_id": "r-1",
            "base_model": BASE,
            "method": "lora",
            "steps": 12,
            "final_loss": 0.5,
            "lora": {"r": self.expect.r},
            "data_sha256": list(DATA),
            "curve": [[1, 2.0], [12, 0.5]],
            "versions": {},
            "kernels": {},
            "files": listed({"adapter.zip": data}),
            "members": listed(members or self.members),
            "tensors": {
                n: {"shape": t["shape"], "dtype": TORCH.get(t["dtype"], t["dtype"])}
                for n, t in header.items()
                if n != "__metadata__"
            },
        }
        return data


VARIANTS: dict[str, dict[str, Any]] = {
    "plain fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
}


# what `save_with_peft` made, so that these tests need no torch
SAVED = Path(__file__).parent / "peft_adapters"


def save_with_peft(variant: str, folder: Path) -> None:
    """One adapter, saved by PEFT itself over a tiny Llama, as if it had learnt."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    settings = {"target_modules": ["q_proj", "v_proj"]} | VARIANTS[variant]
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    base = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter)
    model.to(dtype).peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder, save_embedding_layers=False)


def of_folder(variant: str, folder: Path) -> Adapter:
    members = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    members["tokenizer.json"] = json.dumps(
        {"model": {"vocab": {f"w{i}": i for i in range(40)}}}
    ).encode()
    config = json.loads(members[CONFIG])
    targets = VARIANTS[variant].get("target_modules", ["q_proj", "v_proj"])
    named = tuple(targets) if isinstance(targets, list) else None
    return Adapter(
        members,
        ExpectedResult(BASE, 4, DATA, "lora", 8, named, config["use_dora"], config["use_rslora"]),
    )


@pytest.fixture
def make_adapter() -> Callable[[str], Adapter]:
    return lambda variant="plain fp32": of_folder(variant, SAVED / variant.replace(" ", "-"))


@pytest.fixture
def adapter(make_adapter) -> Adapter:
    return make_adapter()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_installed_peft_saves_today_passes(variant, tmp_path):
    pytest.importorskip("peft")
    save_with_peft(variant, tmp_path / "saved")
    made = of_folder(variant, tmp_path / "saved")
    assert check(tmp_path, made.seal(), made).tensors > 0


def check(tmp_path: Path, data: bytes, made: Adapter):
    path = tmp_path / "adapter.zip"
    path.write_bytes(data)
    return verify(path, made.manifest, made.expect)


def refused(tmp_path: Path, data: bytes, made: Adapter) -> str:
    """What the refusal says; a test that calls this fails when nothing is refused."""
    with pytest.raises(AdapterError) as error:
        check(tmp_path, data, made)
    assert error.value.money == "the box is kept, with the result on it"
    assert error.value.hint
    return str(error.value)


# -- what is clean passes --------------------------------------------------------------------------


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_clean_adapter_of_peft_passes(variant, how, make_adapter, tmp_path):
    made = make_adapter(variant)
    data = made.zip(how=how)
    found = check(tmp_path, made.seal(data), made)
    header, body = made.header()
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.steps, found.final_loss, found.size_bytes) == (12, 0.5, len(data))
    assert found.tensors == len(header) - ("__metadata__" in header)
    assert found.parameters * {"bf16": 2, "fp16": 2}.get(variant, 4) == len(body)
    made.manifest["steps"] = 1
    assert check(tmp_path, data, made).steps == 1


def test_expectations_come_from_the_wire_job():
    from trainer.wire.job import Data, DataFile, Job, Lora, ModelSpec, Training

    files = [DataFile(path="data/a.json", name="a.json", sha256=h, size_bytes=1) for h in DATA]
    lora = Lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    job = Job(
        run_id="r-1",
        model=ModelSpec(base=BASE),
        data=Data(files=files),
        lora=lora,
        training=Training(),
    )
    wanted = ExpectedResult(BASE, 4, DATA, "lora", 8, ("q_proj", "v_proj"), False, False, "default")
    assert ExpectedResult.of(job.model_dump(mode="json")) == wanted


def test_a_fully_trained_model_passes_as_its_weights_alone(adapter, tmp_path):
    adapter.members = {WEIGHTS: adapter.members[WEIGHTS]}
    data = adapter.seal()
    adapter.manifest["method"] = "full"
    adapter.expect = replace(adapter.expect, method="full")
    assert check(tmp_path, data, adapter).tensors > 0


@pytest.mark.slow
def test_200_megabytes_are_verified_in_two_seconds_of_cpu(adapter, tmp_path):
    rows = 200_000_000 // 4 // 2 // 4
    a = np.full((4, rows), 0.01, np.float32)
    names = ["base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"]
    body = a.tobytes() * 2
    shapes = ([4, rows], [rows, 4])
    offsets = ([0, a.nbytes], [a.nbytes, 2 * a.nbytes])
    rows_of = zip(names, shapes, offsets, strict=True)
    adapter.set_weights(
        {n: {"dtype": "F32", "shape": s, "data_offsets": o} for n, s, o in rows_of}, body
    )
    adapter.members[CONFIG] = json.dumps(adapter.config() | {"target_modules": ["q_proj"]}).encode()
    adapter.expect = replace(adapter.expect, target_modules=("q_proj",))
    data = adapter.seal(adapter.zip(how=zipfile.ZIP_STORED))
    began = time.process_time()
    assert check(tmp_path, data, adapter).parameters == 8 * rows
    assert time.process_time() - began < 2.0


# -- damage on the way -----------------------------------------------------------------------------

N_DAMAGES = 120


def damage(data: bytes, seed: int) -> bytes:
    """One of: cut short, a bit flipped, a stretch zeroed, doubled, swapped, inserted, grown."""
    rng = random.Random(seed)
    at, kind = rng.randrange(len(data)), seed % 7
    span = rng.randrange(1, 64)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        at = next(i for i in range(at, at + len(data)) if data[i % len(data)]) % len(data)
        return data[:at] + bytes(min(span, len(data) - at)) + data[at + span :]
    if kind == 3:
        return data[: at + span] + data[at:]
    if kind == 4:
        return data[at:] + data[:at] if at else data + b"x"
    if kind == 5:
        return data[:at] + rng.randbytes(span) + data[at:]
    return data + rng.randbytes(span)


@pytest.mark.parametrize("seed", range(N_DAMAGES))
def test_damage_on_the_way_is_caught(seed, make_adapter, tmp_path):
    made = make_adapter(list(VARIANTS)[seed % len(VARIANTS)])
    data = made.seal()
    spoilt = damage(data, seed)
    assert spoilt != data
    assert "its manifest says" in refused(tmp_path, spoilt, made)


@pytest.mark.parametrize("seed", range(60))
def test_damage_that_the_hash_of_the_whole_would_miss_is_caught_by_what_is_inside(
    seed, make_adapter, tmp_path
):
    """The manifest's hash of the archive is made to fit; its hashes of the members stay honest."""
    made = make_adapter(list(VARIANTS)[seed % len(VARIANTS)])
    data = made.seal(made.zip(how=zipfile.ZIP_STORED))
    rng = random.Random(seed)
    starts = [data.index(b) for b in made.members.values()]
    member = rng.randrange(len(starts))
    at = starts[member] + rng.randrange(len(list(made.members.values())[member]))
    spoilt = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    made.manifest["files"]["adapter.zip"]["sha256"] = hashlib.sha256(spoilt).hexdigest()
    assert "adapter.zip" in refused(tmp_path, spoilt, made)


# -- a box that lies: archive and manifest agree ---------------------------------------------------

Spoil = Callable[[Adapter], None]


def tensor_names(made: Adapter, part: str) -> list[str]:
    return [n for n in made.header()[0] if part in n]


def set_number(part: str, bits: bytes, index: int = 0) -> Spoil:
    def spoil(made: Adapter) -> None:
        header, body = made.header()
        begin, end = header[tensor_names(made, part)[index]]["data_offsets"]
        at = begin + (end - begin) // len(bits) // 2 * len(bits)
        made.set_weights(header, body[:at] + bits + body[at + len(bits) :])

    return spoil


def zeroed(part: str, only_first: bool = False) -> Spoil:
    def spoil(made: Adapter) -> None:
        header, body = made.header()
        for name in tensor_names(made, part)[: 1 if only_first else None]:
            begin, end = header[name]["data_offsets"]
            body = body[:begin] + bytes(end - begin) + body[end:]
        made.set_weights(header, body)

    return spoil


def without(part: str) -> Spoil:
    """Drop the first tensor of this kind, bytes and all."""

    def spoil(made: Adapter) -> None:
        header, body = made.header()
        name = tensor_names(made, part)[0]
        begin, end = header.pop(name)["data_offsets"]
        for row in header.values():
            if "data_offsets" in row and row["data_offsets"][0] >= end:
                row["data_offsets"] = [n - (end - begin) for n in row["data_offsets"]]
        made.set_weights(header, body[:begin] + body[end:])

    return spoil


def header_with(change: Callable[[dict[str, Any], str], None]) -> Spoil:
    def spoil(made: Adapter) -> None:
        header, body = made.header()
        change(header, tensor_names(made, "lora_A")[0])
        made.set_weights(header, body)

    return spoil


def renamed(new: str) -> Spoil:
    def spoil(made: Adapter) -> None:
        header, body = made.header()
        header[new] = header.pop(tensor_names(made, "lora_A")[0])
        made.set_weights(header, body)

    return spoil


def config_with(**changes: Any) -> Spoil:
    def spoil(made: Adapter) -> None:
        made.members[CONFIG] = json.dumps(made.config() | changes).encode()

    return spoil


def member(name: str, data: bytes) -> Spoil:
    return lambda made: made.members.__setitem__(name, data)


def weights_as(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda made: made.members.__setitem__(WEIGHTS, change(made.members[WEIGHTS]))


def raw_header(text: bytes) -> Spoil:
    return lambda made: made.members.__setitem__(
        WEIGHTS, struct.pack("<Q", len(text)) + text + made.header()[1]
    )


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


LIES: dict[str, tuple[Spoil, str]] = {
    "NaN in lora_A": (set_number("lora_A", f32(math.nan)), "not finite"),
    "NaN in lora_B": (set_number("lora_B", f32(math.nan)), "not finite"),
    "negative NaN with payload": (set_number("lora_B", b"\x01\x00\xc0\xff"), "not finite"),
    "signalling NaN": (set_number("lora_A", b"\x01\x00\x80\x7f"), "not finite"),
    "infinity": (set_number("lora_A", f32(math.inf)), "not finite"),
    "minus infinity in the last tensor": (set_number("lora_B", f32(-math.inf), -1), "not finite"),
    "all lora_B zero": (zeroed("lora_B"), "nothing was learnt"),
    "one lora_A zero": (zeroed("lora_A", only_first=True), "all zero"),
    "all zero": (zeroed("lora_"), "all zero"),
    "lora_A missing": (without("lora_A"), "lacks its lora_A"),
    "lora_B missing": (without("lora_B"), "lacks its lora_B"),
    "no tensor": (lambda m: m.set_weights({}, b""), "holds no tensor"),
    "a stray tensor": (renamed("base_model.model.q_proj.weight"), "belongs to no LoRA"),
    "a tensor of another module": (
        renamed("base_model.model.x_proj.lora_A.weight"),
        "target_modules|lacks",
    ),
    "unknown dtype": (header_with(lambda h, n: h[n].update(dtype="F4")), "dtype 'F4'"),
    "dtype of another size": (header_with(lambda h, n: h[n].update(dtype="F64")), "yet takes"),
    "shape too large": (header_with(lambda h, n: h[n].update(shape=[4, 17])), "yet takes"),
    "shape transposed": (
        header_with(lambda h, n: h[n].update(shape=h[n]["shape"][::-1])),
        "says r 4",
    ),
    "shape negative": (header_with(lambda h, n: h[n].update(shape=[-4, -16])), "has shape"),
    "shape of floats": (header_with(lambda h, n: h[n].update(shape=[4.0, 16.0])), "has shape"),
    "shape a text": (header_with(lambda h, n: h[n].update(shape="4x16")), "has shape"),
    "huge shape that multiplies to zero": (
        header_with(lambda h, n: h[n].update(shape=[2**62, 0])),
        "has shape",
    ),
    "offsets reversed": (
        header_with(lambda h, n: h[n].update(data_offsets=h[n]["data_offsets"][::-1])),
        "data_offsets",
    ),
    "offsets beyond the end": (
        header_with(
            lambda h, n: h[n].update(data_offsets=[o + 10**9 for o in h[n]["data_offsets"]])
        ),
        "begins at byte|ends",
    ),
    "offsets overlap": (
        header_with(
            lambda h, n: (
                h[n].update(data_offsets=[0, 256]) or h[list(h)[-1]].update(data_offsets=[0, 256])
            )
        ),
        "begins at|takes",
    ),
    "three offsets": (
        header_with(lambda h, n: h[n].update(data_offsets=[0, 1, 2])),
        "data_offsets",
    ),
    "no offsets": (header_with(lambda h, n: h[n].pop("data_offsets")), "not described"),
    "an extra key": (header_with(lambda h, n: h[n].update(evil=1)), "not described"),
    "an entry that is a list": (header_with(lambda h, n: h.update({n: []})), "not described"),
    "metadata of numbers": (
        header_with(lambda h, n: h.update(__metadata__={"format": 1})),
        "__metadata__",
    ),
    "bytes after the last tensor": (weights_as(lambda b: b + bytes(16)), "its tensors take"),
    "weights cut short": (weights_as(lambda b: b[:-10]), "too early"),
    "weights cut in the header": (weights_as(lambda b: b[:40]), "header claims"),
    "weights of four bytes": (weights_as(lambda b: b[:4]), "too early"),
    "weights empty": (weights_as(lambda b: b""), "too early"),
    "header longer than the file": (
        weights_as(lambda b: struct.pack("<Q", 1 << 40) + b[8:]),
        "header claims",
    ),
    "header length near 2**64": (weights_as(lambda b: b"\xff" * 8 + b[8:]), "header claims"),
    "header no JSON": (raw_header(b"{nope"), WEIGHTS),
    "header a list": (raw_header(b"[]"), "not a JSON object"),
    "header not UTF-8": (raw_header(b'{"\xff": 1}'), WEIGHTS),
    "header nested a million deep": (raw_header(b'{"a":' * 100_000), "nested|JSON|Expecting"),
    "config missing": (lambda m: m.members.pop(CONFIG) and None, f"lacks {CONFIG}"),
    "config no JSON": (member(CONFIG, b"{"), CONFIG),
    "config a list": (member(CONFIG, b"[1]"), "not a LoRA"),
    "config with a key twice": (member(CONFIG, b'{"r": 4, "r": 4}'), "key twice"),
    "config of prompt tuning": (config_with(peft_type="PROMPT_TUNING"), "not a LoRA"),
    "config of another rank": (config_with(r=8), "the job asked for 4"),
    "config with rank true": (config_with(r=True), "the job asked for 4"),
    "config with rank a text": (config_with(r="4"), "the job asked for 4"),
    "config of another base": (config_with(base_model_name_or_path="evil/model"), "evil/model"),
    "config without base": (config_with(base_model_name_or_path=None), "None"),
    "config of another alpha": (config_with(lora_alpha=16), "lora_alpha"),
    "config that claims DoRA": (config_with(use_dora=True), "use_dora"),
    "config that claims rsLoRA": (config_with(use_rslora=True), "use_rslora"),
    "config with fewer targets": (config_with(target_modules=["q_proj"]), "target_modules"),
    "config with more targets": (
        config_with(target_modules=["q_proj", "v_proj", "o_proj"]),
        "target_modules",
    ),
    "config with modules_to_save a text": (
        config_with(modules_to_save="lm_head"),
        "modules_to_save",
    ),
    "config with a rank pattern that does not hold": (
        config_with(rank_pattern={"q_proj": 2}),
        "says r",
    ),
    "tokenizer no JSON": (member("tokenizer.json", b"{"), "tokenizer.json"),
    "tokenizer not UTF-8": (member("tokenizer.json", b'"\xff"'), "tokenizer.json"),
    "tokenizer of nothing": (member("tokenizer.json", b""), "tokenizer.json"),
    "a pickle": (member("adapter_model.bin", b"\x80\x04."), "run code"),
    "a script": (member("modeling_evil.py", b"import os"), "run code"),
    "a second weights file with the same tensors": (
        lambda m: m.members.__setitem__("more.safetensors", m.members[WEIGHTS]),
        "there twice",
    ),
}


NO_TENSORS_TO_LIST = {
    name
    for name in LIES
    if name.startswith(("header", "weights cut in", "weights of", "weights empty"))
} | {"no offsets", "an entry that is a list"}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_a_member_is_caught_and_named(name, adapter, tmp_path):
    spoil, said = LIES[name]
    honest = adapter.seal()
    spoil(adapter)
    if name in NO_TENSORS_TO_LIST:
        data = adapter.zip()
        adapter.manifest |= {
            "files": listed({"adapter.zip": data}),
            "members": listed(adapter.members),
        }
    else:
        data = adapter.seal()
    assert data != honest
    text = refused(tmp_path, data, adapter)
    assert any(part in text for part in said.split("|")), text


@pytest.mark.parametrize(
    ("variant", "part", "bits"),
    [
        ("bf16", "lora_B", b"\xc0\x7f"),
        ("bf16", "lora_A", b"\x80\x7f"),
        ("bf16", "lora_A", b"\x80\xff"),
        ("bf16", "lora_B", b"\x81\xff"),
        ("fp16", "lora_B", b"\x00\x7e"),
        ("fp16", "lora_A", b"\x00\x7c"),
        ("fp16", "lora_A", b"\x00\xfc"),
        ("DoRA", "magnitude", f32(math.nan)),
        ("modules_to_save", "lm_head", f32(math.inf)),
        ("rsLoRA", "lora_A", f32(math.nan)),
        ("embedding", "lora_embedding_B", f32(math.nan)),
        ("all-linear", "down_proj", f32(-math.inf)),
    ],
)
def test_a_number_that_is_not_finite_is_caught_in_every_kind_of_adapter(
    variant, part, bits, make_adapter, tmp_path
):
    made = make_adapter(variant)
    set_number(part, bits)(made)
    assert "not finite" in refused(tmp_path, made.seal(), made)


@pytest.mark.parametrize(
    ("variant", "part"),
    [("DoRA", "magnitude"), ("embedding", "lora_embedding_A"), ("bf16", "lora_B")],
)
def test_a_missing_half_is_caught_in_every_kind_of_adapter(variant, part, make_adapter, tmp_path):
    made = make_adapter(variant)
    without(part)(made)
    assert "lacks its" in refused(tmp_path, made.seal(), made)


def test_an_embedding_that_learnt_nothing_and_nothing_else_is_caught(make_adapter, tmp_path):
    made = make_adapter("embedding")
    zeroed("lora_embedding_A")(made)
    assert check(tmp_path, made.seal(), made).tensors  # q_proj has learnt
    zeroed("lora_B")(made)
    assert "nothing was learnt" in refused(tmp_path, made.seal(), made)
    made = make_adapter("embedding")
    zeroed("lora_embedding_B")(made)
    assert "all zero" in refused(tmp_path, made.seal(), made)


def test_a_dora_vector_without_dora_is_caught(make_adapter, tmp_path):
    made = make_adapter("DoRA")
    config_with(use_dora=False)(made)
    made.expect = replace(made.expect, use_dora=False)
    assert "wants none" in refused(tmp_path, made.seal(), made)


def test_the_largest_finite_number_is_still_finite(adapter, tmp_path):
    for bits in (b"\xff\xff\x7f\x7f", b"\xff\xff\x7f\xff", b"\x01\x00\x00\x00"):
        set_number("lora_A", bits)(adapter)
        assert check(tmp_path, adapter.seal(), adapter).tensors == 8


# -- archives that are made to hang, or to fill memory ---------------------------------------------


def seconds(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


@pytest.mark.parametrize("key", ["(a+)+$", "(", ".*", "q_proj|k_proj", "q proj", ""])
def test_a_regular_expression_of_a_box_is_refused_and_never_run(key, make_adapter, tmp_path):
    made = make_adapter("plain fp32")
    config_with(rank_pattern={key: 4})(made)
    assert "rank_pattern that is no list of modules" in refused(tmp_path, made.seal(), made)


@pytest.mark.parametrize("shape", [[1 << 41], [2] * 9, [10**4000] * 300, [True]])
def test_a_shape_of_huge_numbers_is_refused_before_it_is_multiplied(shape, adapter, tmp_path):
    honest = adapter.seal()
    header_with(lambda h, n: h[n].update(shape=shape))(adapter)
    members, manifest = adapter.members, adapter.manifest
    data = adapter.zip()
    manifest |= {"files": listed({"adapter.zip": data}), "members": listed(members)}
    assert data != honest
    assert seconds(lambda: refused(tmp_path, data, adapter)) < 60


def test_a_directory_of_millions_of_members_is_refused_before_it_is_read(adapter, tmp_path):
    data = bytearray(adapter.seal())
    at = data.rindex(b"PK\5\6")
    data[at + 10 : at + 12] = struct.pack("<H", 65000)
    adapter.manifest["files"] = listed({"adapter.zip": bytes(data)})
    assert "has 65000 members" in refused(tmp_path, bytes(data), adapter)
    data[at + 10 : at + 12] = struct.pack("<H", 3)
    data[at + 12 : at + 16] = struct.pack("<I", 100_000_000)
    adapter.manifest["files"] = listed({"adapter.zip": bytes(data)})
    assert "a directory of 100000000 bytes" in refused(tmp_path, bytes(data), adapter)


def test_an_archive_with_anything_after_its_end_is_refused(adapter, tmp_path):
    for data in (adapter.seal() + b"\0", adapter.seal()[:-1] + b"\1", b""):
        adapter.manifest["files"] = listed({"adapter.zip": data})
        assert "does not end as an archive" in refused(tmp_path, data, adapter)


def claiming(made: Adapter, sizes: dict[str, int]) -> bytes:
    """The archive, with these sizes of members in its directory and in its manifest."""
    data = bytearray(made.zip(how=zipfile.ZIP_STORED))
    for name, size in sizes.items():
        at = data.rindex(name.encode()) - 46 + 24
        data[at : at + 4] = struct.pack("<I", size)
    sealed = made.seal(bytes(data))
    for name, size in sizes.items():
        made.manifest["members"][name]["bytes"] = size
    return sealed


def test_text_beside_the_weights_has_a_limit_each_and_altogether(adapter, tmp_path):
    adapter.members |= {"one.txt": bytes(1 << 20), "two.txt": b"", "three.txt": b""}
    rest = sum(len(data) for name, data in adapter.members.items() if name != WEIGHTS) - (1 << 20)
    most, all_of_them = 64 << 20, (128 << 20) - rest
    two = {"one.txt": most - rest, "two.txt": all_of_them - most + rest}
    for sizes, said in (
        ({"one.txt": most}, f"one.txt ends after {1 << 20} of its {most} bytes"),
        ({"one.txt": most + 1}, f"one.txt has {most + 1} bytes"),
        (two, f"one.txt ends after {1 << 20} of its {most - rest} bytes"),
        (two | {"three.txt": 1}, f"more than {128 << 20} bytes beside its weights"),
    ):
        assert said in refused(tmp_path, claiming(adapter, sizes), adapter)


def test_a_bomb_is_what_unfolds_to_a_byte_more_than_the_limits(adapter, tmp_path):
    """A hundred times its size and 64 MiB, of each member and of all together."""
    adapter.members |= {"one.txt": b"x" * 9999, "two.txt": b"x" * 9999}
    rest = sum(len(data) for name, data in adapter.members.items() if not name.endswith(".txt"))
    each = 100 * 9999 + (64 << 20)
    all_of_them = 100 * len(adapter.zip(how=zipfile.ZIP_STORED)) + (64 << 20) - rest
    for one, two, bomb in (
        (each, 9, False),
        (each + 1, 9, True),
        (each, all_of_them - each, False),
        (each, all_of_them - each + 1, True),
    ):
        said = refused(tmp_path, claiming(adapter, {"one.txt": one, "two.txt": two}), adapter)
        assert ("a bomb" in said) is bomb


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another wire": (lambda m: m.update(wire=3), "wire 3"),
    "the wire of 0.1": (lambda m: m.update(wire=1), "adapter_sha256"),
    "another base": (lambda m: m.update(base_model="evil/model"), "evil/model"),
    "another method": (lambda m: m.update(method="full"), "method 'full'"),
    "another rank": (lambda m: m.update(lora={"r": 8}), "r 8"),
    "no step": (lambda m: m.update(steps=0), "nothing was trained"),
    "minus one step": (lambda m: m.update(steps=-1), "nothing was trained"),
    "steps a text": (lambda m: m.update(steps="12"), "nothing was trained"),
    "loss NaN": (lambda m: m.update(final_loss=math.nan), "final_loss nan"),
    "loss infinite": (lambda m: m.update(final_loss=math.inf), "final_loss inf"),
    "loss nothing": (lambda m: m.update(final_loss=None), "final_loss None"),
    "other data": (lambda m: m.update(data_sha256=["c" * 64]), "names data"),
    "data in another order": (lambda m: m.update(data_sha256=list(DATA[::-1])), "names data"),
    "another size": (lambda m: m["files"]["adapter.zip"].update(bytes=1), "its manifest says 1"),
    "another hash": (
        lambda m: m["files"]["adapter.zip"].update(sha256="0" * 64),
        "its manifest says 000000",
    ),
    "no hash": (lambda m: m["files"]["adapter.zip"].pop("sha256"), "sha256"),
    "no files": (lambda m: m.pop("files"), "files"),
    "files a list": (lambda m: m.update(files=[]), "manifest.json is not"),
    "no archive": (lambda m: m.update(files={}), "adapter.zip"),
    "no members": (lambda m: m.pop("members"), "members"),
    "members a list": (lambda m: m.update(members=[]), "does not list"),
    "no tensors": (lambda m: m.pop("tensors"), "tensors"),
    "no lora": (lambda m: m.pop("lora"), "lora"),
    "a file too many": (
        lambda m: m["members"].update({"extra.json": {"sha256": "0" * 64, "bytes": 1}}),
        "lacks extra.json",
    ),
    "a file too few": (lambda m: m["members"].pop("tokenizer.json"), "does not list"),
    "a file of another hash": (
        lambda m: m["members"]["tokenizer.json"].update(sha256="0" * 64),
        "another sha256",
    ),
    "a file of another size": (
        lambda m: m["members"]["tokenizer.json"].update(bytes=1),
        "its manifest says 1",
    ),
    "a tensor too many": (
        lambda m: m["tensors"].update(ghost={"shape": [1], "dtype": "float32"}),
        "ghost",
    ),
    "a tensor too few": (
        lambda m: m["tensors"].pop(next(iter(m["tensors"]))),
        "not in the manifest",
    ),
    "a tensor of another shape": (
        lambda m: next(iter(m["tensors"].values())).update(shape=[1, 2]),
        "its manifest says",
    ),
    "a tensor of another dtype": (
        lambda m: next(iter(m["tensors"].values())).update(dtype="float16"),
        "its manifest says",
    ),
    "tensors a list": (lambda m: m.update(tensors=[]), "not in the manifest"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_does_not_fit_is_caught_and_says_how(name, adapter, tmp_path):
    change, said = MANIFESTS[name]
    data = adapter.seal()
    change(adapter.manifest)
    assert said in refused(tmp_path, data, adapter)


@pytest.mark.parametrize("value", [None, [], 1, "x"])
def test_a_manifest_that_is_no_object_is_caught(value, adapter, tmp_path):
    data = adapter.seal()
    adapter.manifest = value
    refused(tmp_path, data, adapter)


# -- the archive itself ----------------------------------------------------------------------------

SLIPS = [
    "../evil",
    "/etc/passwd",
    "a/../../evil",
    "..\\evil",
    "C:\\evil",
    "C:evil",
    "\\\\host\\share",
    "a//b",
    "./a",
    "a/./b",
    "a/..",
    "..",
    "evil.",
    "evil ",
    "a\nb",
    "folder/",
    "nul\x01",
    "\u202egpj.exe",
]


@pytest.mark.parametrize("name", SLIPS)
def test_a_member_that_leaves_its_folder_is_caught(name, adapter, tmp_path):
    adapter.members[name] = b"{}"
    assert "written outside its folder" in refused(tmp_path, adapter.seal(), adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.zip"]


def with_entry(made: Adapter, entry: zipfile.ZipInfo, data: bytes = b"{}") -> bytes:
    out = io.BytesIO(made.zip())
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(entry, data)
    return made.seal(out.getvalue(), made.members | {entry.filename: data})


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o010644, 0o060644, 0o040755])
def test_a_link_a_device_a_pipe_and_a_folder_are_caught(mode, adapter, tmp_path):
    entry = zipfile.ZipInfo("innocent.json")
    entry.external_attr = mode << 16
    assert "no plain file" in refused(tmp_path, with_entry(adapter, entry), adapter)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [CONFIG, CONFIG.upper()])
def test_a_name_that_is_there_twice_is_caught(name, adapter, tmp_path):
    data = with_entry(adapter, zipfile.ZipInfo(name), adapter.members[CONFIG])
    assert "twice" in refused(tmp_path, data, adapter)


def test_an_encrypted_member_is_caught(adapter, tmp_path):
    data = bytearray(adapter.zip())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    assert "is encrypted" in refused(tmp_path, adapter.seal(bytes(data)), adapter)


def test_a_bomb_is_caught_before_it_unfolds(adapter, tmp_path):
    adapter.members["bomb.txt"] = bytes(80 << 20)
    data = adapter.seal()
    assert len(data) < 1 << 20
    began = time.process_time()
    assert "a bomb" in refused(tmp_path, data, adapter)
    assert time.process_time() - began < 0.2


def test_a_member_that_unfolds_to_more_than_its_entry_says_is_caught(adapter, tmp_path):
    adapter.members["note.txt"] = b"x" * 5000
    data = bytearray(adapter.zip())
    members = adapter.members | {"note.txt": b"x" * 10}
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        where = data.rindex(mark)
        data[where + at : where + at + 4] = struct.pack("<I", 10)
    assert "note.txt" in refused(tmp_path, adapter.seal(bytes(data), members), adapter)


def test_members_that_share_their_bytes_are_caught(adapter, tmp_path):
    adapter.members["one.txt"] = b"x" * 5000
    adapter.members["two.txt"] = b"x" * 5000
    data = bytearray(adapter.zip())
    last = data.rindex(b"PK\x01\x02")
    before = data.rindex(b"PK\x01\x02", 0, last)
    data[last + 42 : last + 46] = data[before + 42 : before + 46]
    assert "inside another member" in refused(tmp_path, adapter.seal(bytes(data)), adapter)


def test_a_member_that_lies_within_the_bytes_of_another_is_caught(adapter, tmp_path):
    adapter.members = {"in.txt": b"x" * 50} | adapter.members
    adapter.members["out.txt"] = adapter.zip(how=zipfile.ZIP_STORED)[: 30 + len("in.txt") + 50]
    data = bytearray(adapter.zip(how=zipfile.ZIP_STORED))
    entry, inside = data.rindex(b"in.txt") - 46, data.rindex(adapter.members["out.txt"])
    data[entry + 42 : entry + 46] = struct.pack("<I", inside)
    assert "in.txt lies inside another" in refused(tmp_path, adapter.seal(bytes(data)), adapter)


def test_a_member_that_begins_at_the_last_byte_of_another_is_caught(adapter, tmp_path):
    data = bytearray(adapter.zip(how=zipfile.ZIP_STORED))
    at = data.rindex(b"PK\1\2") + 42
    data[at : at + 4] = struct.pack("<I", struct.unpack("<I", data[at : at + 4])[0] - 1)
    assert "inside another member" in refused(tmp_path, adapter.seal(bytes(data)), adapter)


def test_five_thousand_members_are_too_many(adapter, tmp_path):
    adapter.members |= {f"{i}.txt": b"" for i in range(5000)}
    assert "members" in refused(tmp_path, adapter.seal(), adapter)


def test_as_many_members_as_a_result_may_have_pass(adapter, tmp_path):
    adapter.members |= {f"{i}.txt": b"" for i in range(4096 - len(adapter.members))}
    assert check(tmp_path, adapter.seal(), adapter).tensors > 0
    adapter.members["one more"] = b""
    assert "has 4097 members" in refused(tmp_path, adapter.seal(), adapter)


def with_wide_end(data: bytes, members: int | None = None, directory: int | None = None) -> bytes:
    """The archive with zip64's end of the directory before its own, as large archives have it; the
    counts are the archive's own unless given."""
    body, end = data[:-22], bytearray(data[-22:])
    count, size, at = struct.unpack("<HII", end[10:20])
    members = count if members is None else members
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, members, members, size, at)
    if directory is not None:
        wide = wide[:40] + struct.pack("<Q", directory) + wide[48:]
    pointer = struct.pack("<4sIQI", b"PK\6\7", 0, len(body), 1)
    end[8:20] = b"\xff" * 12
    return body + wide + pointer + bytes(end)


def test_an_archive_with_a_wide_directory_is_counted_by_that(adapter, tmp_path):
    data = with_wide_end(adapter.zip())
    assert check(tmp_path, adapter.seal(data), adapter).tensors > 0
    many = with_wide_end(adapter.zip(), members=(1 << 40) + 5)
    assert f"has {(1 << 40) + 5} members" in refused(tmp_path, adapter.seal(many), adapter)
    for size in ((4 << 20) + 1, 1 << 50):
        large = with_wide_end(adapter.zip(), directory=size)
        assert f"a directory of {size} bytes" in refused(tmp_path, adapter.seal(large), adapter)


def test_a_directory_is_refused_by_its_size_before_it_is_read(adapter, tmp_path):
    data = bytearray(adapter.zip())
    data[-10:-6] = struct.pack("<I", (4 << 20) + 1)
    said = refused(tmp_path, adapter.seal(bytes(data)), adapter)
    assert f"a directory of {(4 << 20) + 1} bytes" in said
    data[-10:-6] = struct.pack("<I", 4 << 20)
    assert "a directory of" not in refused(tmp_path, adapter.seal(bytes(data)), adapter)


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 1000, b"\x1f\x8b" + bytes(100)])
def test_what_is_no_archive_is_caught(data, adapter, tmp_path):
    assert "does not end as an archive" in refused(tmp_path, adapter.seal(data), adapter)


def test_an_archive_of_nothing_is_caught(adapter, tmp_path):
    data = b"PK\x05\x06" + bytes(18)
    assert "has 0 members" in refused(tmp_path, adapter.seal(data), adapter)


def test_a_missing_file_is_an_adapter_error_too(adapter, tmp_path):
    adapter.seal()
    with pytest.raises(AdapterError, match="cannot be read"):
        verify(tmp_path / "nothing.zip", adapter.manifest, adapter.expect)


def test_more_than_two_hundred_corruptions_are_planted():
    assert N_DAMAGES + 60 + len(LIES) + len(MANIFESTS) + len(SLIPS) >= 200
