"""What a bundle holds, without installing it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ops.errors import ConfigError, PreflightError
from ops.image.bundle import bundle, inventory, sbom
from ops.image.bundle import parts as stair
from ops.image.bundle.contents import Options
from ops.image.bundle.inventory import Present
from ops.image.bundle.parts import Step


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def installed(tiny: Any) -> Present:
    return Present(ref="mtb/tiny:old", layers=tiny.cargo().image.diff_ids)


def test_every_file_of_a_bundle_is_in_sha256sums_and_in_the_manifest(tiny: Any, tmp_path: Path, release_key: Path) -> None:
    tiny.add_model().pack(tmp_path / "b", Options(parity_members=4, key=release_key))
    files = content(tmp_path / "b")
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    assert set(files) - set(sums) == {"SHA256SUMS", "SHA256SUMS.sig", "SHA256SUMS.openssl"}
    assert all(hashlib.sha256(files[p]).hexdigest() == digest for p, digest in sums.items())
    manifest = json.loads(files["MANIFEST.json"])
    assert set(manifest["files"]) == set(sums) - {"MANIFEST.json"}
    assert len(manifest["image"]["layers"]) == 7


def test_the_same_inputs_give_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    tiny.add_model()
    tiny.pack(tmp_path / "one")
    tiny.pack(tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_each_part_of_a_full_bundle_carries_exactly_one_layer(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stair, "SMALL_BYTES", 0)
    tiny.pack(tmp_path / "b")
    parts = sorted((tmp_path / "b" / "parts").iterdir())
    assert [p.name[:2] for p in parts] == ["01", "02", "03", "04", "05", "06", "07"]
    for number, part in enumerate(parts, 1):
        with tarfile.open(part) as tar:
            blobs = [m for m in tar.getnames() if m.startswith("blobs/")]
            listed = json.loads(tar.extractfile("manifest.json").read())[0]["Layers"]
        assert len(listed) == number and len([b for b in blobs if b in listed]) == 1


def test_runs_of_small_layers_share_a_part_that_stays_small(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stair, "SMALL_BYTES", 150_000)
    steps = stair.plan_steps(tiny.cargo().image, None)
    assert [(s.first, s.last) for s in steps] == [(1, 1), (2, 2), (3, 7)]


def test_no_volume_is_larger_than_asked_and_together_they_are_the_file(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "whole", Options(parity_members=0))
    tiny.pack(tmp_path / "cut", Options(volume_bytes=100_000, parity_members=0))
    whole, cut = content(tmp_path / "whole" / "parts"), content(tmp_path / "cut" / "parts")
    assert len(cut) > len(whole) and max(map(len, cut.values())) == 100_000
    for name, data in whole.items():
        assert b"".join(cut[v] for v in sorted(cut) if v == name or v.startswith(name + ".v")) == data


def test_an_update_of_the_trainer_carries_the_layers_above_it_and_nothing_else(tiny: Any, tmp_path: Path) -> None:
    base = installed(tiny)
    tiny.contents["trainer"] = {"app/train.py": b"print('two')\n"}
    found = tiny.pack(tmp_path / "b", Options(parity_members=8, base=base))
    assert found.kind == "delta" and found.carried_layers == 1
    assert sum(p.stat().st_size for p in (tmp_path / "b" / "parts").iterdir()) < 16_000
    assert not (tmp_path / "b" / "parity").exists()  # over one volume it would be a copy of it


def test_an_update_of_one_small_wheel_carries_that_wheel_and_takes_the_layers_above_from_the_server(tiny: Any, tmp_path: Path) -> None:
    base = installed(tiny)
    tiny.contents["wheel-a"] = {"lib/a.py": tiny.contents["wheel-a"]["lib/a.py"][::-1]}
    found = tiny.pack(tmp_path / "b", Options(parity_members=0, base=base))
    steps = stair.plan_steps(tiny.cargo().image, base)
    assert steps == [Step(3, 7, (3,), (4, 5, 6, 7))]
    assert found.carried_layers == 1
    parts = sum(p.stat().st_size for p in (tmp_path / "b" / "parts").iterdir())
    assert parts < 1.1 * 40_000 + 32_000  # headers of the archive: 20 KB here, whatever the wheel


def test_unchanged_layers_come_back_in_archives_of_bounded_size(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = installed(tiny)
    tiny.contents["os"] = dict(tiny.contents["os"], **{"etc/release": b"2"})
    monkeypatch.setattr(stair, "BATCH_BYTES", 0)
    image = tiny.cargo().image
    largest = max(x.size_bytes for x in image.layers)
    steps = stair.plan_steps(image, base)
    assert [k for s in steps for k in range(s.first, s.last + 1)] == list(range(1, 8))
    assert all(sum(image.layers[k - 1].size_bytes for k in range(s.first, s.last + 1)) <= largest for s in steps)


def test_an_inventory_chooses_the_image_that_shares_the_most_and_models_that_are_there_stay_out(tiny: Any, tmp_path: Path) -> None:
    image = tiny.add_model().cargo().image
    near, far = Present(ref="near", layers=image.diff_ids[:5]), Present(ref="far", layers=image.diff_ids[:2])
    server = inventory.Inventory(milktea_preflight=1, server="s", engine="24", images=[far, near])
    assert server.base_for(image.diff_ids) == near
    assert inventory.Inventory(milktea_preflight=1, server="s", engine="24").base_for(image.diff_ids) is None
    here = frozenset(m.set_digest for m in tiny.cargo().lock.models)
    tiny.pack(tmp_path / "b", Options(base=near, base_models=here))
    assert not (tmp_path / "b" / "models").exists()


def test_an_inventory_that_is_none_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"hello": 1}')
    for path in (tmp_path / "x.json", tmp_path / "absent.json"):
        with pytest.raises(ConfigError) as refused:
            inventory.read(path)
        assert "preflight --json" in refused.value.hint


def test_the_bill_of_materials_is_valid_cyclonedx_and_names_every_wheel_and_model_with_its_hash(tiny: Any) -> None:
    lock = tiny.add_model().cargo().lock
    document = json.loads(sbom.cyclonedx(lock))
    spec = importlib.util.find_spec("cyclonedx")
    assert spec and spec.submodule_search_locations, "cyclonedx-python-lib is in the dev requirements: it carries the schema"
    schemas = Path(spec.submodule_search_locations[0], "schema", "_res")
    schema = json.loads((schemas / "bom-1.6.SNAPSHOT.schema.json").read_text())
    from referencing import Registry, Resource

    registry = Registry().with_resources(
        (f"http://cyclonedx.org/schema/{name.replace('.SNAPSHOT', '')}", Resource.from_contents(json.loads((schemas / name).read_text())))
        for name in ("spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    )
    jsonschema.Draft7Validator(schema, registry=registry).validate(document)
    hashes = {c["name"]: c["hashes"][0]["content"] for c in document["components"]}
    assert hashes == {"a": "a" * 64, "org/Tiny-1B": lock.models[0].set_digest.removeprefix("sha256:")}
    assert sbom.cyclonedx(lock) == sbom.cyclonedx(lock)


def test_a_model_file_that_is_not_the_locks_is_refused_before_a_bundle_appears(tiny: Any, tmp_path: Path) -> None:
    cargo = tiny.add_model().cargo()
    file = next(cargo.models["org/Tiny-1B"].glob("*1-of*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PreflightError, match="half downloaded") as refused:
        bundle.write_bundle(cargo, tmp_path / "b")
    assert "milktea image fetch tiny" in refused.value.hint and not (tmp_path / "b").exists()
    file.unlink()
    with pytest.raises(PreflightError, match="is missing"):
        bundle.write_bundle(cargo, tmp_path / "b")


def test_a_layer_that_is_not_on_this_machine_is_refused_with_the_command_that_builds_it(tiny: Any, tmp_path: Path) -> None:
    cargo = tiny.cargo()
    cargo.image.layers[2].path.unlink()
    with pytest.raises(PreflightError) as refused:
        bundle.write_bundle(cargo, tmp_path / "b")
    assert refused.value.hint == "make image IMAGE=tiny"


def test_a_folder_that_holds_something_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        tiny.pack(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.doc").read_text() == "x"


def test_no_room_is_said_with_the_number_before_anything_is_written(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PreflightError, match="1,000 free"):
        tiny.pack(tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.part").exists()


def test_a_path_that_a_shell_would_cut_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.add_model()
    folder = tiny.models["org/Tiny-1B"]
    (folder / "with space.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"with space\.json"):
        tiny.pack(tmp_path / "b")


def test_the_readme_names_the_image_in_both_languages_and_leaves_no_blank(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b")
    for language in ("en", "zh"):
        text = (tmp_path / "b" / f"README.{language}.txt").read_text("utf-8")
        assert "tiny" in text and "@" not in text and "sh INSTALL.sh" in text
