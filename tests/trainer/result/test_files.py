"""An adapter's archive as somebody gives it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

from trainer.result import files
from trainer.result.files import KNOWN, NoAdapter, unpacked


def archive(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


def spoiled(path: Path, at: bytes, offset: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(at) + offset] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("members", "spoil", "why"),
    [
        ([("../x", b"x")], None, "leads out"),
        ([("/x", b"x")], None, "leads out"),
        ([("a\\..\\x", b"x")], None, "leads out"),
        ([("a", b"x"), ("a/b", b"x")], None, "cannot be unpacked"),
        ([("a", b"x" * 99)], lambda p: spoiled(p, b"PK\1\2", 8, 1), "encrypted"),
        ([("a", b"x" * 99)], lambda p: spoiled(p, b"PK\1\2", 10, 99), "compression"),
        ([("a", b"x" * 99)], lambda p: spoiled(p, b"PK\3\4", 31, 255), "cannot be unpacked"),
        ([("a", bytes(4 << 20))], None, "would become"),
        ([("a", b"x")], lambda p: p.write_bytes(b"PK\3\4"), "not a zip"),
        ([("a", b"x")], lambda p: p.unlink(), "there is no"),
    ],
)
def test_an_archive_that_harms_is_refused_in_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: list[tuple[str, bytes]],
    spoil: Callable[[Path], object] | None,
    why: str,
) -> None:
    monkeypatch.setattr(files, "MAX_SMALL", 1 << 20)
    path = archive(tmp_path / "a.zip", members)
    if spoil is not None:
        spoil(path)
    with pytest.raises(NoAdapter, match=why), unpacked(path):
        pass


def test_a_name_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / "a.zip", [("a", b"x"), ("a", b"y")])
    with pytest.raises(NoAdapter, match="two files of one name"), unpacked(path):
        pass


def test_the_settings_that_are_known_are_those_of_peft() -> None:
    assert set(KNOWN) >= {field.name for field in fields(LoraConfig)} - {"task_type"}
