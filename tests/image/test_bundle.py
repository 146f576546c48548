"""What a bundle holds, without installing it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ops.errors import ConfigError, PreflightError
from ops.image import carry, workflow
from ops.image.bundle import bundle, inventory, parts, sbom
from ops.image.bundle.contents import Options
from ops.image.bundle.inventory import Present
from ops.image.bundle.parts import Part
from ops.image.spec import lock as locks


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def installed(tiny: Any) -> Present:
    return Present(ref="mtb/tiny:old", layers=tiny.made().image.diff_ids)


def test_every_file_of_a_bundle_is_in_sha256sums_and_every_volume_in_the_plan(
    tiny: Any, tmp_path: Path, release_key: Path
) -> None:
    tiny.add_model().pack(tmp_path / "b", Options(key=release_key))
    files = content(tmp_path / "b")
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    assert set(files) - set(sums) == {"SHA256SUMS", "SHA256SUMS.sig", "SHA256SUMS.openssl"}
    assert not any("release" in path or path.startswith("keys") for path in files), (
        "a key on the disk vouches for nothing"
    )
    assert all(hashlib.sha256(files[p]).hexdigest() == digest for p, digest in sums.items())
    volumes = {
        line.split()[1] for line in files["PLAN"].decode().splitlines() if line[:4] == "vol "
    }
    assert volumes == {path for path in sums if path.startswith(("parts/", "models/"))}


def test_the_same_inputs_give_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    tiny.add_model()
    tiny.pack(tmp_path / "one")
    tiny.pack(tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_each_part_of_a_full_bundle_carries_exactly_one_layer(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SMALL_BYTES", 0)
    tiny.pack(tmp_path / "b")
    archives = sorted((tmp_path / "b" / "parts").iterdir())
    assert [p.name[:2] for p in archives] == ["01", "02", "03", "04", "05", "06", "07"]
    for number, part in enumerate(archives, 1):
        with tarfile.open(part) as tar:
            blobs = [m for m in tar.getnames() if m.startswith("blobs/")]
            listed = json.loads(tar.extractfile("manifest.json").read())[0]["Layers"]
        assert len(listed) == number and len([b for b in blobs if b in listed]) == 1


def test_no_volume_is_larger_than_asked_and_together_they_are_the_file(
    tiny: Any, tmp_path: Path
) -> None:
    tiny.pack(tmp_path / "whole", Options())
    tiny.pack(tmp_path / "cut", Options(volume_bytes=100_000))
    whole, cut = content(tmp_path / "whole" / "parts"), content(tmp_path / "cut" / "parts")
    assert len(cut) > len(whole) and max(map(len, cut.values())) == 100_000
    for name, data in whole.items():
        assert (
            b"".join(cut[v] for v in sorted(cut) if v == name or v.startswith(name + ".v")) == data
        )


def test_runs_of_small_layers_share_a_part_that_stays_small(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SMALL_BYTES", 150_000)
    assert parts.plan_parts(tiny.made().image, None) == [Part(1, 1), Part(2, 2), Part(3, 7)]


def test_an_update_of_the_trainer_carries_its_layer_and_those_above_it(
    tiny: Any, tmp_path: Path
) -> None:
    base = installed(tiny)
    tiny.contents["trainer"] = {"app/train.py": b"print('two')\n"}
    found = tiny.pack(tmp_path / "b", Options(base=base))
    assert found.kind == "update" and found.carried_layers == 2
    carried = sum(p.stat().st_size for p in (tmp_path / "b" / "parts").iterdir())
    assert carried <= 2 * tarfile.RECORDSIZE, "a tar ends at a whole record"


def test_an_update_of_one_wheel_carries_it_and_the_layers_above_whole(tiny: Any) -> None:
    base = installed(tiny)
    tiny.contents["wheel-a"] = {"lib/a.py": tiny.contents["wheel-a"]["lib/a.py"][::-1]}
    assert [k for p in parts.plan_parts(tiny.made().image, base) for k in p.carried] == [
        3,
        4,
        5,
        6,
        7,
    ]


def test_an_update_of_the_config_alone_carries_the_last_part(tiny: Any) -> None:
    base = installed(tiny)
    tiny.environment = ("NEW=1",)
    assert parts.plan_parts(tiny.made().image, base) == [Part(7, 7)]


def test_an_inventory_chooses_the_image_that_shares_the_most_and_models_that_are_there_stay_out(
    tiny: Any, tmp_path: Path
) -> None:
    image = tiny.add_model().made().image
    digest = tiny.made().lock.models[0].set_digest
    lines = [
        "milktea-server 1",
        "server s",
        "engine 24.0.7",
        "gpu NVIDIA A100, 580.95.05, 8.0, 81920 MiB, Disabled",
    ]
    for ref, count in (("far:1", 2), ("near:1", 5)):
        lines += [f"image {ref}", *(f"layer {x}" for x in image.diff_ids[:count])]
    lines += [
        "image strange:1",
        "layer sha256:" + "0" * 64,
        f"model {digest.removeprefix('sha256:')}",
        "check a|ok|b|c|d",
    ]
    (tmp_path / "server.txt").write_text("\n".join(lines))
    server = inventory.read(tmp_path / "server.txt")
    base = server.base_for(image.diff_ids)
    assert base == Present("near:1", image.diff_ids[:5])
    assert server.gpus == (inventory.Gpu("NVIDIA A100", "580.95.05", "8.0"),)
    assert server.base_for(["sha256:" + "1" * 64]) is None
    tiny.pack(tmp_path / "b", Options(base=base, base_models=server.models))
    assert not (tmp_path / "b" / "models").exists()


def test_an_inventory_that_is_none_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text('{"hello": 1}')
    for path in (tmp_path / "x.txt", tmp_path / "absent.txt"):
        with pytest.raises(ConfigError) as refused:
            inventory.read(path)
        assert "preflight --facts" in refused.value.hint


def test_since_takes_a_bundle_or_its_lock_and_a_layer_of_other_gzip_bytes_counts_as_changed(
    tiny: Any, tmp_path: Path
) -> None:
    image = tiny.made().image
    tiny.pack(tmp_path / "full")
    for since in (tmp_path / "full", tmp_path / "full" / "image.lock"):
        base, models = carry._base(image, since, None)
        assert base is not None and base.layers == image.diff_ids and models == frozenset()
    other = replace(
        image,
        layers=(
            *image.layers[:3],
            replace(image.layers[3], blob_sha256="f" * 64),
            *image.layers[4:],
        ),
    )
    base, _ = carry._base(other, tmp_path / "full", None)
    assert base is not None and parts.plan_parts(other, base)[0].first == 4
    with pytest.raises(ConfigError, match="exclude"):
        carry._base(image, tmp_path / "full", tmp_path / "server.txt")
    lock = tiny.made().lock
    locks.write(lock.model_copy(update={"identity": None}), tmp_path / "committed.lock")
    with pytest.raises(ConfigError, match="not the lock of a built image"):
        carry._base(image, tmp_path / "committed.lock", None)


def test_one_oci_archive_holds_the_whole_image(tiny: Any, tmp_path: Path) -> None:
    made = tiny.made()
    path = bundle.write_oci(made, tmp_path / "tiny.oci.tar")
    with tarfile.open(path) as tar:
        names = set(tar.getnames())
    assert {
        f"blobs/sha256/{layer.blob_sha256}" for layer in made.image.layers
    } <= names and "oci-layout" in names
    with pytest.raises(ConfigError, match="exists"):
        bundle.write_oci(made, path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 0), ("fat32", 4_294_967_295), ("dvd", 4_700_000_000), ("1000000000", 1_000_000_000)],
)
def test_volume_sizes_are_bytes_or_the_names_of_media(text: str, size: int) -> None:
    assert carry.volume_bytes(text) == size


@pytest.mark.parametrize("text", ["4GB", "12", "floppy"])
def test_other_volume_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="volume size"):
        carry.volume_bytes(text)


def test_the_name_of_an_image_of_ones_own_is_taken_from_its_reference() -> None:
    assert workflow.name_of("registry.example:5000/team/Train_Plus:3") == "train-plus"
    with pytest.raises(ConfigError, match="names no image"):
        workflow.name_of("///")


def test_the_bill_of_materials_is_valid_cyclonedx_and_names_every_wheel_and_model_with_its_hash(
    tiny: Any,
) -> None:
    lock = tiny.add_model().made().lock
    document = json.loads(sbom.cyclonedx(lock))
    spec = importlib.util.find_spec("cyclonedx")
    assert spec and spec.submodule_search_locations, (
        "cyclonedx-python-lib is in the dev requirements: it carries the schema"
    )
    schemas = Path(spec.submodule_search_locations[0], "schema", "_res")
    schema = json.loads((schemas / "bom-1.6.SNAPSHOT.schema.json").read_text())
    from referencing import Registry, Resource

    registry = Registry().with_resources(
        (
            f"http://cyclonedx.org/schema/{name.replace('.SNAPSHOT', '')}",
            Resource.from_contents(json.loads((schemas / name).read_text())),
        )
        for name in ("spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    )
    jsonschema.Draft7Validator(schema, registry=registry).validate(document)
    hashes = {c["name"]: c["hashes"][0]["content"] for c in document["components"]}
    assert hashes == {
        "a": "a" * 64,
        "org/Tiny-1B": lock.models[0].set_digest.removeprefix("sha256:"),
    }
    assert sbom.cyclonedx(lock) == sbom.cyclonedx(lock)


def test_a_model_file_that_is_not_the_locks_is_refused_before_a_bundle_appears(
    tiny: Any, tmp_path: Path
) -> None:
    cargo = tiny.add_model().made()
    file = next(cargo.models["org/Tiny-1B"].glob("*1-of*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PreflightError, match="half downloaded") as refused:
        bundle.write_bundle(cargo, tmp_path / "b")
    assert "milktea image fetch tiny" in refused.value.hint and not (tmp_path / "b").exists()
    file.unlink()
    with pytest.raises(PreflightError, match="is missing"):
        bundle.write_bundle(cargo, tmp_path / "b")


def test_a_layer_that_is_not_on_this_machine_is_refused_with_the_command_that_builds_it(
    tiny: Any, tmp_path: Path
) -> None:
    cargo = tiny.made()
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


def test_no_room_is_said_with_the_number_before_anything_is_written(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PreflightError, match="1,000 free"):
        tiny.pack(tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.part").exists()


def test_the_first_line_of_each_page_says_no_at_once_to_a_signature_as_large_as_a_layer(
    tiny: Any, tmp_path: Path, release_key: Path
) -> None:
    at = tmp_path / "b"
    tiny.pack(at, Options(key=release_key))
    pages = [
        at / "README.en.txt",
        at / "README.zh.txt",
        Path(__file__).parents[2] / "docs/airgap.md",
    ]
    lines = [re.findall(r"^ +(.*check-novalidate.*)$", x.read_text("utf-8"), re.M) for x in pages]
    [line] = {line for found in lines for line in found}

    def typed() -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "-c", line], cwd=at, capture_output=True, text=True, timeout=10
        )
        return done.returncode, done.stdout + done.stderr

    assert typed()[0] == 0 and "Good" in typed()[1]
    with (at / "SHA256SUMS.sig").open("ab") as file:
        file.truncate(1 << 30)  # over such a file ssh-keygen works for hours
    assert typed() == (1, "")


def test_a_path_that_a_shell_would_cut_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.add_model()
    folder = tiny.models["org/Tiny-1B"]
    (folder / "with space.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"with space\.json"):
        tiny.pack(tmp_path / "b")


def test_the_readme_names_the_image_in_both_languages_and_leaves_no_blank(
    tiny: Any, tmp_path: Path, release_key: Path
) -> None:
    tiny.pack(tmp_path / "signed", Options(key=release_key))
    tiny.pack(tmp_path / "unsigned", Options(base=Present("mtb/tiny:old", [])))
    for language in ("en", "zh"):
        text = (tmp_path / "signed" / f"README.{language}.txt").read_text("utf-8")
        assert "tiny" in text and "@" not in text and "[/" not in text
        first = text.splitlines()[3:9]
        assert any("ssh-keygen -Y check-novalidate" in line for line in first), (
            "the first lines need no script of ours"
        )
        assert (
            text.index("check-novalidate")
            < text.index("sha256sum -c")
            < text.index("sh INSTALL.sh --key")
        )
        text = (tmp_path / "unsigned" / f"README.{language}.txt").read_text("utf-8")
        assert (
            "--key" not in text
            and "ssh-keygen" not in text.split("PREFIX")[0]
            and "mtb/tiny:old" in text
        )


def test_the_licences_come_with_the_offer_of_the_sources(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b")
    text = (tmp_path / "b/licenses/SOURCES.txt").read_text()
    assert "https://snapshot.debian.org/package/NAME/VERSION/" in text and "three years" in text
