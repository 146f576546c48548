"""Recipes: what an update carries, and that following them gives the very files."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.image import update
from ops.image.bundle import manifest as papers
from ops.image.bundle.contents import Options
from ops.image.bundle.inventory import Present
from ops.image.layers import packed_member


def keep(folder: Path, *files: bytes) -> dict[str, Path]:
    found = {hashlib.sha256(data).hexdigest(): data for data in files}
    for digest, data in found.items():
        (folder / digest).write_bytes(data)
    return {digest: folder / digest for digest in found}


def layer(dice: random.Random, sizes: list[int]) -> list[bytes]:
    return [packed_member(dice.randbytes(size)) for size in sizes]


def written(folder: Path, members: list[bytes]) -> dict[str, Path]:
    (folder / "new").write_bytes(b"".join(members))
    return {"layers/x": folder / "new"}


def test_a_layer_in_which_one_member_changed_carries_that_member(tmp_path: Path) -> None:
    dice = random.Random(1)
    members = layer(dice, [5000] * 20)
    kept = keep(tmp_path, b"".join(members))
    members[7] = packed_member(dice.randbytes(300))
    made = update.plan(written(tmp_path, members), kept)
    assert (made.layers, made.papers) == (members[7], b"")
    assert update.rebuild(made.recipes["layers/x"], made.layers, kept) == b"".join(members)


def test_members_that_moved_to_another_layer_are_found_there(tmp_path: Path) -> None:
    one, two = layer(random.Random(2), [4000] * 5), layer(random.Random(3), [4000] * 5)
    kept = keep(tmp_path, b"".join(one), b"".join(two))
    made = update.plan(written(tmp_path, [two[4], one[0], two[0], two[1]]), kept)
    assert made.layers == b"" and len(made.recipes["layers/x"].pieces) == 3


def test_a_file_that_is_kept_whole_costs_nothing_even_where_its_content_is_not_on_this_machine(tmp_path: Path) -> None:
    data = b"the same tool\n" * 100
    made = update.plan({"tools/x": data}, {hashlib.sha256(data).hexdigest(): None})
    assert made == update.Update({}, frozenset({"tools/x"})) and made.text() == ""


def test_what_has_nothing_in_common_with_the_kept_files_has_no_recipe(tmp_path: Path) -> None:
    kept = keep(tmp_path, b"".join(layer(random.Random(4), [5000] * 5)))
    assert update.plan(written(tmp_path, layer(random.Random(5), [5000] * 5)), kept) == update.NOTHING
    assert update.plan({"paper": random.Random(6).randbytes(3000)}, kept) == update.NOTHING


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab=\n", max_size=90), max_size=30), st.data())
def test_any_edited_text_is_rebuilt_to_the_byte(tmp_path_factory: pytest.TempPathFactory, lines: list[str], data: st.DataObject) -> None:
    old = "\n".join(lines)
    at = data.draw(st.integers(0, len(old)))
    new = old[:at] + data.draw(st.text("ab=\n", max_size=40)) + old[data.draw(st.integers(at, len(old))) :]
    kept = keep(tmp_path_factory.mktemp("kept"), old.encode())
    made = update.plan({"paper": new.encode()}, kept)
    for recipe in made.recipes.values():
        assert update.rebuild(recipe, made.papers, kept) == new.encode()


def test_of_a_paper_full_of_repetitions_the_one_changed_hash_travels(tmp_path: Path) -> None:
    rows = [f'{{"hashes": [{{"alg": "SHA-256", "content": "{hashlib.sha256(bytes([n])).hexdigest()}"}}]}}' for n in range(100)]
    kept = keep(tmp_path, "\n".join(rows).encode(), b"")
    rows[50] = rows[50].replace(rows[50][41:105], hashlib.sha256(b"new").hexdigest())
    made = update.plan({"one": "\n".join(rows).encode(), "two": "\n".join(rows[:90]).encode()}, kept)
    assert len(made.papers) <= 2 * 64 and len(made.text()) < 150
    for name, text in (("one", rows), ("two", rows[:90])):
        assert update.rebuild(made.recipes[name], made.papers, kept) == "\n".join(text).encode()


def test_an_update_is_a_few_kilobytes_where_the_server_kept_the_bundle_before(tiny: Any, tmp_path: Path) -> None:
    tiny.contents["trainer"] = {f"app/{n}.py": random.Random(n).randbytes(6_000) for n in range(30)}
    kept = tiny.kept()
    base = Present(ref="mtb/tiny:old", layers=tiny.cargo().image.diff_ids)
    tiny.pack(tmp_path / "full")
    tiny.contents["trainer"]["app/7.py"] = b"print('two')\n" * 400
    found = tiny.pack(tmp_path / "b", Options(base=base, kept=kept))
    assert found.carried_layers == 1 and found.size_bytes < 64_000 < 180_000
    assert not (tmp_path / "b" / "image.lock").exists() and (tmp_path / "b" / "INSTALL.sh").stat().st_size < 2_000


def test_the_lock_of_a_bundle_lists_what_the_server_keeps_of_it(tiny: Any, tmp_path: Path) -> None:
    from ops.image.spec import lock

    tiny.pack(tmp_path / "b")
    listed = lock.read(tmp_path / "b" / "image.lock").kept
    found = papers.kept(tiny.cargo()).hashes()
    assert listed == {path: digest for path, digest in found.items() if path != "image.lock"}
    assert {"INSTALL.sh", "layers/trainer", "layers/os", "sbom/image.cdx.json"} <= set(listed)


@pytest.mark.slow
def test_of_our_last_ten_changes_to_the_trainer_most_travel_in_64_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ops.errors import MilkteaError

    monkeypatch.syspath_prepend(Path(__file__).parent)
    import measure_updates

    try:
        sizes = measure_updates.commits("practice", 10)
    except (MilkteaError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the practice image's wheels or the history are not here: {error}")
    assert len(sizes) == 10 and sorted(sizes)[7] <= 64_000
