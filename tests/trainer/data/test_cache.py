"""The cache of tokenised rows on a disk that takes no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from trainer.data import cache
from trainer.data.tokenised import Rows


def test_a_cache_for_which_the_disk_has_no_room_is_none_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    cache.write_cache(tmp_path / "file" / "rows.safetensors", Rows.empty())
    path = tmp_path / "cache" / "rows.safetensors"

    def full(arrays: object, part: Path) -> None:
        part.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(cache, "save_file", full)
        cache.write_cache(path, Rows.empty())
    assert cache.read_cache(path) is None and list(path.parent.iterdir()) == []
    cache.write_cache(path, Rows.empty())
    assert cache.read_cache(path) is not None and list(path.parent.iterdir()) == [path]
