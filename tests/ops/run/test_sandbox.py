"""Verification in a process of its own: what hangs or eats memory ends there, and the client goes
on with a sentence."""

from __future__ import annotations

import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import AdapterError
from ops.run import sandbox
from ops.run.expected import ExpectedResult

DATA = "a" * 64
EXPECT = ExpectedResult("stub", 4, (DATA,), lora_alpha=8, target_modules=("q_proj",))


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A folder with a sane result."""
    rig.adapter(tmp_path / "result", DATA)
    return tmp_path / "result"


def verify(folder: Path) -> sandbox.Inspected:
    return sandbox.verify(folder / "manifest.json", folder / "adapter.zip", EXPECT)


def change(folder: Path, **facts: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_sane_result_is_verified_with_what_a_report_shows(sent: Path) -> None:
    looked = verify(sent)
    assert looked.verified.tensors == 2 and looked.verified.sha256
    assert looked.facts["steps"] == 2 and looked.facts["curve"] == [[1, 2.0], [2, 1.0]]
    names = ("adapter.zip", "loss.png", "other")
    assert set(sandbox.listing(sent / "manifest.json", names)) == {"adapter.zip", "loss.png"}


def test_what_is_wrong_is_told_as_in_one_process(sent: Path) -> None:
    change(sent, base_model="evil/model")
    with pytest.raises(AdapterError, match="evil/model"):
        verify(sent)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"wire": 2}', '{"files": {}}', "[" * 100_000, '{"files": {"adapter.zip": 7}}'],
)
def test_a_manifest_that_is_none_is_said_to_be_none(sent: Path, text: str) -> None:
    (sent / "manifest.json").write_text(text)
    with pytest.raises(AdapterError, match=r"manifest\.json is not"):
        sandbox.listing(sent / "manifest.json", ("adapter.zip",))


def test_a_listed_size_that_is_none_is_refused(sent: Path) -> None:
    for size in (-1, 1 << 60, "7", True):
        change(sent, files={"adapter.zip": {"sha256": "0" * 64, "bytes": size}})
        with pytest.raises(AdapterError, match="is listed with"):
            sandbox.listing(sent / "manifest.json", ("adapter.zip",))


def test_a_result_that_eats_memory_ends_its_own_process(
    sent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 MB of JSON, 20 KB of archive: Python takes half a gigabyte for it."""
    monkeypatch.setattr(sandbox, "MAX_MEMORY", 600 << 20)
    nested = b"[" + b"[[]]," * 4_000_000 + b"0]"
    with zipfile.ZipFile(sent / "adapter.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vocab.json", nested)
        names = {i.filename: archive.read(i.filename) for i in archive.infolist()}
    whole = (sent / "adapter.zip").read_bytes()
    change(sent, files=rig.listed({"adapter.zip": whole}), members=rig.listed(names))
    with pytest.raises(AdapterError, match=r"of memory|not verified with"):
        verify(sent)


def test_a_result_that_takes_for_ever_is_given_up(
    sent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.remove(sent / "manifest.json")
    os.mkfifo(sent / "manifest.json")  # whoever opens it waits
    monkeypatch.setattr(sandbox, "START_S", 1.0)
    began = time.monotonic()
    with pytest.raises(AdapterError, match="not verified within 2 s"):
        verify(sent)
    assert time.monotonic() - began < 100


def test_it_knows_no_secret_of_the_environment(sent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = sandbox.subprocess.run

    def look(command: list[str], **how: Any) -> Any:
        seen.update(how["env"])
        return real(command, **how)

    monkeypatch.setenv("VAST_API_KEY", "secret-key")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sandbox.subprocess, "run", look)
    verify(sent)
    assert seen and not {"VAST_API_KEY", "HF_TOKEN"} & set(seen)
