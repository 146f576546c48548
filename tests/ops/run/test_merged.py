"""A result that its box merges before it goes, against the emulator; only the merge is a stub."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.box.transfer import sha256_of
from ops.errors import ConfigError
from ops.fakevast import FakeVast
from ops.job import config
from ops.job.plan import Plan
from ops.market.workload import Workload
from ops.run.expected import Invalid
from ops.run.merged_result import listed, verify
from ops.run.view import Run

pytestmark = pytest.mark.timeout(60)
ONE = struct.pack("<H", 0x3F80)  # 1 in bf16
NUMBERS = {"kl_nats": 1e-7, "share_of_effect": 1e-4, "max_token_nats": 0.01}


def weights(**tensors: tuple[str, bytes]) -> bytes:
    """A safetensors file of vectors by name: (dtype, bytes)."""
    rows, at = {}, 0
    for name, (dtype, data) in tensors.items():
        item = 4 if dtype == "F32" else 2
        rows[name] = {
            "dtype": dtype,
            "shape": [len(data) // item],
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    header = json.dumps(rows).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(d for _, d in tensors.values())


def merged_model(own: rig.Rig, **more: bytes) -> Path:
    """What a trainer leaves of the stub's adapter, with `more` files."""
    folder = own.image / "merged"
    folder.mkdir(exist_ok=True)
    files = {
        "config.json": json.dumps({"model_type": "llama", "dtype": "bfloat16"}).encode(),
        "model.safetensors": weights(a=("BF16", ONE * 9), b=("BF16", ONE * 4)),
        **more,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with zipfile.ZipFile(own.image / "result/adapter.zip") as archive:
        adapter = hashlib.sha256(archive.read("adapter_model.safetensors")).hexdigest()
    told = {
        "adapter_sha256": adapter,
        "files_sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "files_bytes": {name: len(data) for name, data in files.items()},
        "numbers": NUMBERS,
    }
    (folder / "certificate.json").write_text(json.dumps(told))
    return folder


def asking(own: rig.Rig, **more: Any) -> Plan:
    load = Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8, merged_bytes=2e6)
    return own.plan(merged=True, workload=load, **more)


def test_the_merged_model_comes_home_beside_the_adapter_and_is_told(
    own: rig.Rig, fake: FakeVast
) -> None:
    made, plan = merged_model(own), asking(own)
    outcome, lines, _ = rig.whole_run(own, fake, plan=plan)
    home = outcome.adapter_zip.parent / "merged-bf16"
    names = ["certificate.json", "config.json", "model.safetensors"]
    assert sorted(p.name for p in home.iterdir()) == names
    assert all(sha256_of(home / name) == sha256_of(made / name) for name in names)
    assert [line.kind for line in lines][-5:-2] == ["pulled", "merged", "destroying"]
    assert Run(own.runs / plan.run_id).merged == (home, "")
    assert lines[-4]["tensors"] == 2 and lines[-4]["bytes_out"] > 100


def no_number(own: rig.Rig) -> None:
    merged_model(own, **{"model.safetensors": weights(a=("BF16", struct.pack("<H", 0x7FC0)))})


LIES: dict[str, tuple[Callable[[rig.Rig], object], str]] = {
    "a merge that is refused": (lambda own: None, "exit code 3: refused: the merge loses"),
    "a NaN": (no_number, "a is not finite"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_merged_model_does_not_come_home_and_takes_nothing_of_the_result(
    own: rig.Rig, fake: FakeVast, lie: str
) -> None:
    act, why = LIES[lie]
    act(own)
    outcome, lines, _ = rig.whole_run(own, fake, plan=asking(own))
    assert outcome.adapter_zip.is_file(), outcome
    [line] = [line for line in lines if line.kind == "merged"]
    assert re.search(why, line["why_not"].replace("\n", " ")), line["why_not"]
    assert [p.name for p in outcome.adapter_zip.parent.glob("*merged*")] == []
    assert fake.instances() == []


def test_a_merge_for_which_the_limits_do_not_reach_is_not_begun(
    own: rig.Rig, fake: FakeVast
) -> None:
    merged_model(own)
    plan = asking(own, max_s=700.0)  # merging may take 600 s, and the box goes before its end
    outcome, lines, screen = rig.whole_run(own, fake, plan=plan)
    assert outcome.adapter_zip.is_file(), outcome
    [line] = [line for line in lines if line.kind == "merged"]
    assert "it takes up to 10 minutes, and the limits leave" in line["why_not"]
    assert any("the adapter is at home" in told for told in screen.told)
    assert Run(own.runs / plan.run_id).merged[0] is None


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"model.safetensors": weights(a=("F32", b"\0\0\x80\x3f"))}, "is float32"),
        ({"model.safetensors": weights(a=("BF16", b"\0" * 8))}, "every weight is zero"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, "where its"),
        ({"config.json": b'{"model_type": "x", "auto_map": {"A": "evil/x--m.C"}}'}, "another pl"),
        ({"config.json": b'{"model_type": "x", "quantization_config": {}}'}, "quantised"),
        ({"tokenizer.json": b"[]"}, "is no object"),
    ],
)
def test_every_byte_of_a_merged_model_is_looked_at(
    tmp_path: Path, files: dict[str, bytes], why: str
) -> None:
    good = {"config.json": b'{"model_type": "x"}', "model.safetensors": weights(a=("BF16", ONE))}
    for name, data in (good | files).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(Invalid, match=why):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"../config.json": ["a" * 64, 3]}, "which no merged model has"),
        ({"x.py": [HASH := "a" * 64, 3]}, "which no merged model has"),
        ({"tokenizer.json": [HASH, 3]}, "not the one in adapter.zip"),
        ({"config.json": ["A" * 64, 3]}, "without a sha256"),
        ({"config.json": [HASH, True]}, "is listed with True"),
        ({"config.json": [HASH, 65 << 20]}, "has 68,157,440 bytes"),
        ({"b.safetensors": [HASH, 3]}, "2 files and no index"),
    ],
)
def test_a_certificate_lists_what_a_merged_model_has_and_no_more(
    change: dict[str, list[Any]], why: str
) -> None:
    files = {"config.json": ["a" * 64, 3], "a.safetensors": ["a" * 64, 1 << 40]} | change
    told = {
        "adapter_sha256": "b" * 64,
        "files_sha256": {name: sha256 for name, (sha256, _) in files.items()},
        "files_bytes": {name: size for name, (_, size) in files.items()},
        "numbers": NUMBERS,
    }
    members = {"adapter_model.safetensors": {"sha256": "b" * 64}}
    members |= {"tokenizer.json": {"sha256": "c" * 64}}
    with pytest.raises(Invalid, match=why):
        listed(told, members)


def test_a_certificate_is_of_the_adapter_that_is_at_home_and_has_numbers() -> None:
    told = {
        "adapter_sha256": "b" * 64,
        "files_sha256": dict.fromkeys(("config.json", "a.safetensors"), "a" * 64),
        "files_bytes": dict.fromkeys(("config.json", "a.safetensors"), 3),
        "numbers": NUMBERS,
    }
    members = {"adapter_model.safetensors": {"sha256": "b" * 64}}
    assert listed(told, members)["files"]["a.safetensors"] == ["a" * 64, 3]
    with pytest.raises(Invalid, match="another adapter"):
        listed(told | {"adapter_sha256": "d" * 64}, members)
    with pytest.raises(Invalid, match="no numbers"):
        listed(told | {"numbers": dict.fromkeys(NUMBERS, math.nan)}, members)


def test_a_job_asks_for_a_merge_of_what_can_be_merged_alone(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "name": "x",
        "model": {"base": "org/base"},
        "data": {"files": ["rows.json"]},
        "limits": {"max_usd": 1.0},
        "results": {"merged": True},
    }
    assert config.parse(job, tmp_path / "job.toml").results.merged
    stages = [{"stage": "rm"}, {"stage": "sft"}]
    chain = config.parse(job | {"stages": stages}, tmp_path / "job.toml")
    assert [part.results.merged for part in chain.parts] == [False, True]
    for training, why in (({"method": "full"}, "whole model"), ({"method": "p_tuning"}, "learned")):
        with pytest.raises(ConfigError, match=why):
            config.parse(job | {"training": training}, tmp_path / "job.toml")
    with pytest.raises(ConfigError, match="reward model"):
        config.parse(job | {"stage": "rm"}, tmp_path / "job.toml")
