from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.image import parity


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20), members=st.integers(1, 9))
def test_groups_hold_every_volume_once_and_are_as_large_as_their_largest(sizes: list[int], members: int) -> None:
    volumes = {f"v{n}": size for n, size in enumerate(sizes)}
    found = parity.groups(volumes, members)
    assert sorted(m for g in found for m in g.members) == sorted(volumes)
    assert all(len(g.members) <= members and g.size_bytes == max(volumes[m] for m in g.members) for g in found)


def test_alike_volumes_share_a_group_so_that_parity_costs_its_share() -> None:
    volumes = {f"big{n}": 1000 for n in range(8)} | {f"small{n}": 10 for n in range(8)}
    assert sum(g.size_bytes for g in parity.groups(volumes, 8)) == 1010


@pytest.mark.parametrize("lost", range(4))
def test_any_one_lost_volume_is_the_xor_of_the_others(tmp_path: Path, lost: int) -> None:
    dice = random.Random(lost)
    files = [tmp_path / f"v{n}" for n in range(4)]
    for file, size in zip(files, (3_000_001, 2_000_000, 5, 0), strict=True):
        file.write_bytes(dice.randbytes(size))
    found = parity.xor_files(files, 3_000_001, tmp_path / "P.01").file(3_000_001, "parity")
    written = (tmp_path / "P.01").read_bytes()
    assert (found.sha256, found.blake2) == (hashlib.sha256(written).hexdigest(), hashlib.blake2b(written, digest_size=32).hexdigest())
    others = [f for n, f in enumerate(files) if n != lost] + [tmp_path / "P.01"]
    parity.xor_files(others, files[lost].stat().st_size, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == files[lost].read_bytes()


def test_a_volume_longer_than_its_parity_is_refused_instead_of_cut(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"12345")
    with pytest.raises(ValueError, match="5 bytes, its parity group holds 3"):
        parity.xor_files([tmp_path / "v"], 3, tmp_path / "P.01")


def test_a_group_without_members_is_refused() -> None:
    with pytest.raises(ValueError, match="protects nothing"):
        parity.groups({"v": 1}, 0)
