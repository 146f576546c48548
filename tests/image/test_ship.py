from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ops.errors import ConfigError
from ops.image import ship
from ops.image.bundle import manifest as papers
from ops.image.bundle.contents import Options
from ops.image.driver import Line
from ops.image.spec import lock
from ops.image.spec.lock import Cuda
from ops.image.spec.paths import Places


def test_architectures_are_read_however_torch_or_a_definition_spells_them() -> None:
    cuda = Cuda(line="cu130", toolkit="13.0.2", min_driver="580.65.06", architectures=["7.5", "sm_80", "9.0a", "sm_100a", "12.0+PTX", "compute_120"])
    assert ship.line_of("x", cuda) == Line("x", "13.0", ("7.5", "8.0", "9.0a", "10.0a", "12.0"), ("12.0", "12.0"))
    assert ship.line_of("cpu", None) == Line("cpu", None)


def test_a_toolkit_without_a_known_driver_is_refused_with_the_place_to_add_it() -> None:
    with pytest.raises(ConfigError, match=r"14\.7 is unknown") as refused:
        ship.line_of("x", Cuda(line="cu147", toolkit="14.7", min_driver="700", architectures=[]))
    assert "ops/image/driver.py" in refused.value.hint


def test_the_projects_own_definitions_agree_with_the_driver_table() -> None:
    found = ship.lines(Places())
    assert len(found) >= 2
    for line in found:
        stated = ship.definition.read(Places().definition(line.name)).cuda
        assert stated is not None and stated.min_driver == line.floor


@pytest.mark.parametrize(("text", "size"), [("", 0), ("fat32", 4_294_967_295), ("dvd", 4_700_000_000), ("1000000000", 1_000_000_000)])
def test_volume_sizes_are_bytes_or_the_names_of_media(text: str, size: int) -> None:
    assert ship.volume_bytes(text) == size


@pytest.mark.parametrize("text", ["4GB", "12", "floppy"])
def test_other_volume_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="volume size"):
        ship.volume_bytes(text)


def test_an_image_that_was_not_assembled_is_refused_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        ship.bundle("practice", tmp_path / "out", places=Places(tmp_path))
    assert refused.value.hint == "make image IMAGE=practice"


def test_since_and_inventory_exclude_each_other_and_a_committed_lock_is_no_base(tiny: Any, tmp_path: Path) -> None:
    whole = tiny.cargo().lock
    lock.write(whole, tmp_path / "image.lock")
    lock.write(whole.model_copy(update={"identity": None}), tmp_path / "committed.lock")
    (tmp_path / "server.json").write_text('{"milktea_preflight":1,"server":"s","engine":"24"}')
    with pytest.raises(ConfigError, match="exclude"):
        ship._base([], tmp_path / "image.lock", tmp_path / "server.json", Places())
    with pytest.raises(ConfigError, match="not the whole lock"):
        ship._base([], tmp_path / "committed.lock", None, Places())
    base, _, _ = ship._base(tiny.cargo().image.diff_ids, tmp_path / "image.lock", None, Places())
    assert base is not None and base.layers == tiny.cargo().image.diff_ids
    assert ship._base([], None, tmp_path / "server.json", Places()) == (None, frozenset(), {})


def test_an_update_builds_on_a_bundle_or_its_lock_or_on_an_update_that_this_machine_made(tiny: Any, tmp_path: Path) -> None:
    places, image = Places(tmp_path), tiny.cargo().image
    tiny.pack(tmp_path / "full")
    for since in (tmp_path / "full", tmp_path / "full" / "image.lock"):
        base, _, kept = ship._base(image.diff_ids, since, None, places)
        assert base is not None and base.layers == image.diff_ids
        assert set(kept) == set(papers.kept(tiny.cargo()).hashes().values())
    held = tiny.kept()
    tiny.contents["trainer"] = {"app/train.py": b"print('two')\n"}
    tiny.pack(tmp_path / "update", Options(base=base, kept=held))
    assert not (tmp_path / "update" / "image.lock").exists()
    with pytest.raises(ConfigError, match="made on another machine"):
        ship._base(image.diff_ids, tmp_path / "update", None, places)
    places.kept.mkdir(parents=True)
    for digest, data in papers.kept(tiny.cargo()).by_hash().items():
        (places.kept / digest).write_bytes(data)
    base, _, _ = ship._base(image.diff_ids, tmp_path / "update", None, places)
    assert base is not None and base.layers == tiny.cargo().image.diff_ids
    with pytest.raises(ConfigError, match="is not a bundle"):
        ship._base(image.diff_ids, tmp_path, None, places)
