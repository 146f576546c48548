"""INSTALL.sh on real engines: the machine's own, and a newer one with either image store
(tests/image/modern-engine.sh).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from image_engines import Engine, answers, podman
from image_shell import CU130, script
from image_shell import jail as few

from ops.image.bundle.contents import Options
from ops.image.bundle.inventory import Present, read
from ops.image.bundle.parts import final_tag

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(params=["here", "28-overlay2", "28-containerd", "podman"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "podman":
        return podman()
    if request.param != "here":
        return request.getfixturevalue("modern")(request.param.removeprefix("28-"))
    found = Engine("here", os.environ.get("DOCKER_HOST", ""))
    if not shutil.which("docker") or not answers(
        replace(found, host=found.host or "unix:///var/run/docker.sock")
    ):
        pytest.skip("no Docker engine here")
    return found


@pytest.fixture
def product(tiny: Any, engine: Engine) -> Iterator[Any]:
    """The tiny image under a name of its own; whatever of it is loaded goes away afterwards."""
    tiny.name = f"t{uuid.uuid4().hex[:10]}"
    tiny.with_python()
    for files in tiny.contents.values():
        files["etc/hostname"] = tiny.name.encode()  # no layer in common with images of other tests
    yield tiny
    for tag in engine.tags(f"mtb/{tiny.name}"):
        engine.docker("rmi", "-f", f"mtb/{tiny.name}:{tag}", check=False)


@pytest.fixture
def on(install: Callable, engine: Engine) -> Callable[..., Any]:
    def run(folder: Path, *arguments: str, **more: Any) -> Any:
        return install(folder, *arguments, **engine.environment, **more)

    return run


def present(tiny: Any) -> Present:
    return Present(ref="before", layers=tiny.made().image.diff_ids)


def new_trainer(tiny: Any) -> None:
    tiny.contents["trainer"] = tiny.contents["trainer"] | {"app/train.py": b"print('two')\n"}


def new_wheel(tiny: Any) -> None:
    tiny.contents["wheel-a"] = tiny.contents["wheel-a"] | {
        "lib/a.py": tiny.contents["wheel-a"]["lib/a.py"][::-1]
    }


def test_a_bare_server_with_sh_docker_and_coreutils_installs_and_proves_the_bundle(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    product.add_model().pack(tmp_path / "b", Options(volume_bytes=250_000))
    named = [] if os.path.isabs(engine.program) else [engine.program]
    jail = few(tmp_path / "jail", *named, "test")
    model = sorted((tmp_path / "b" / "models").rglob("*.safetensors*"))[1]
    whole = model.read_bytes()
    model.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    ran = on(tmp_path / "b", path=jail)
    assert ran.code == 4 and model.name in ran.err and "as it was before" in ran.err
    model.write_bytes(whole)
    ran = on(tmp_path / "b", path=jail)
    assert ran.code == 0, ran.out + ran.err
    assert engine.layers(f"mtb/{product.name}:current") == product.made().image.diff_ids
    assert engine.tags(f"mtb/{product.name}") == {
        "current",
        final_tag(product.made().image).partition(":")[2],
    }
    model = product.made().lock.models[0]
    folder = tmp_path / "prefix" / "models" / model.set_digest.removeprefix("sha256:")
    assert {f.path: f.size_bytes for f in model.files} == {
        p.name: p.stat().st_size for p in folder.iterdir() if p.name != ".sha256"
    }
    assert (tmp_path / "prefix/models/by-name/org/Tiny-1B/config.json").is_file()
    locks = {p.name: p.read_bytes() for p in (tmp_path / "prefix/records").glob("*.lock")}
    assert locks == {
        f"image-{final_tag(product.made().image).partition(':')[2]}.lock": (
            (tmp_path / "b/image.lock").read_bytes()
        )
    }
    record = json.loads((tmp_path / "prefix/INSTALL-RECORD.json").read_text())
    assert record["selftest"]["ok"] and record["image"]["layers"] == product.made().image.diff_ids
    left_over = [p.name for p in (tmp_path / "prefix" / "state").iterdir()]
    assert sorted(left_over) == ["default", product.name]
    evidence = (tmp_path / "prefix/EVIDENCE.html").read_text()
    assert "said hello" in evidence and product.made().image.diff_ids[0] in evidence


def test_a_model_alone_is_brought_in_by_the_image_that_is_here(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    from ops.image.bundle import bundle

    product.add_model("org/Alone-1B")
    made = product.made()
    contents = bundle.of_models("models-alone", made.lock.models, made.models)
    bundle.write_bundle(contents, tmp_path / "models", Options(volume_bytes=250_000))
    ran = on(tmp_path / "models")
    assert ran.code == 3 and "no image is installed" in ran.err and "as it was before" in ran.err
    product.models = {}
    product.pack(tmp_path / "image")
    assert on(tmp_path / "image").code == 0
    tags, evidence = engine.tags(f"mtb/{product.name}"), tmp_path / "prefix/EVIDENCE.html"
    before = evidence.read_bytes()
    ran = on(tmp_path / "models")
    assert ran.code == 0, ran.out + ran.err
    assert (tmp_path / "prefix/models/by-name/org/Alone-1B/config.json").is_file()
    assert engine.tags(f"mtb/{product.name}") == tags and evidence.read_bytes() == before
    records = [json.loads(p.read_text()) for p in (tmp_path / "prefix/records").glob("*.json")]
    assert sorted(record["bundle"]["kind"] for record in records) == ["full", "models"]


def test_updates_bring_what_changed_and_go_back_in_a_second(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    product.pack(tmp_path / "v1", Options(release=1))
    assert on(tmp_path / "v1").code == 0
    base = present(product)
    new_trainer(product)
    product.pack(tmp_path / "v2", Options(release=2, base=base))
    ran = on(tmp_path / "v2")
    assert ran.code == 0, ran.out + ran.err
    second = product.made().image
    inventory = tmp_path / "server.txt"
    inventory.write_text(on(tmp_path / "v2", "preflight", "--facts").out)
    new_wheel(product)
    third = product.made().image
    found = read(inventory).base_for(third.diff_ids)
    assert found is not None and found.layers == second.diff_ids
    packed = product.pack(tmp_path / "v3", Options(release=3, base=found))
    assert packed.kind == "update" and packed.carried_layers == 5
    ran = on(tmp_path / "v3")
    assert ran.code == 0, ran.out + ran.err
    assert engine.layers(f"mtb/{product.name}:current") == third.diff_ids
    ran = on(tmp_path / "v2")
    assert ran.code == 5 and "--allow-older" in ran.err
    assert on(tmp_path / "v3", "rollback").code == 0
    assert engine.layers(f"mtb/{product.name}:current") == second.diff_ids


def test_an_update_whose_base_is_not_there_is_refused_before_anything_is_loaded(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    base = present(product)
    new_wheel(product)
    product.pack(tmp_path / "update", Options(base=base))
    ran = on(tmp_path / "update")
    assert (
        ran.code == 3
        and "pruned or never installed" in ran.out
        and "carry the full bundle" in ran.out
    )
    assert engine.tags(f"mtb/{product.name}") == set()


def test_another_image_with_the_same_layers_is_not_taken_for_ours(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    """Same layers, other ENTRYPOINT, under our name: an attacker's, or a release that changes the
    config alone.
    """
    product.pack(tmp_path / "v1", Options(release=1))
    assert on(tmp_path / "v1").code == 0
    first = engine.docker("image", "inspect", "--format", "{{.Id}}", f"mtb/{product.name}:current")
    base = present(product)
    product.environment = ("NEW=1",)
    product.pack(tmp_path / "v2", Options(release=2, base=base))
    made = product.made().image
    engine.docker("tag", f"mtb/{product.name}:current", final_tag(made))
    ran = on(tmp_path / "v2")
    assert ran.code == 0, ran.out + ran.err
    assert (
        engine.docker("image", "inspect", "--format", "{{.Id}}", f"mtb/{product.name}:current")
        != first
    )
    shown = engine.docker(
        "image", "inspect", "--format", "{{json .Config.Env}}", f"mtb/{product.name}:current"
    )
    assert "NEW=1" in shown


def broken_after_hashing(tiny: Any, layer: str) -> Any:
    """A cargo whose blob is damaged although every hash of the bundle will fit: the packer's own
    disk lied.
    """
    cargo = tiny.made()
    found = next(x for x in cargo.image.layers if x.name == layer)
    data = bytearray(found.path.read_bytes())
    data[len(data) // 2] ^= 1
    found.path.write_bytes(data)
    return cargo


@pytest.mark.parametrize("layer", ["cublas", "config"])
def test_an_image_that_the_engine_takes_but_that_is_broken_is_found_and_removed(
    product: Any, engine: Engine, on: Callable, tmp_path: Path, layer: str
) -> None:
    from ops.image.bundle import bundle

    new_trainer(product)
    product.pack(tmp_path / "good")
    assert on(tmp_path / "good").code == 0
    before = engine.tags(f"mtb/{product.name}")
    product.contents[layer] = dict(
        product.contents[layer], **{"etc/changed": random.Random(3).randbytes(20_000)}
    )
    bundle.write_bundle(broken_after_hashing(product, layer), tmp_path / "bad", Options())
    assert on(tmp_path / "bad", "verify").code == 0
    ran = on(tmp_path / "bad")
    assert ran.code in (6, 7), ran.out + ran.err
    assert "do this:" in ran.err and "as it was before" in ran.err
    assert engine.tags(f"mtb/{product.name}") == before


def test_an_image_that_does_not_prove_itself_never_becomes_current(
    product: Any, engine: Engine, on: Callable, tmp_path: Path
) -> None:
    product.pack(tmp_path / "good")
    assert on(tmp_path / "good").code == 0
    before, current = (
        engine.tags(f"mtb/{product.name}"),
        engine.layers(f"mtb/{product.name}:current"),
    )
    product.contents["config"] = {"bin/prove": b"#!/bin/sh\necho the GPU burns >&2\nexit 1\n"}
    product.pack(tmp_path / "bad")
    ran = on(tmp_path / "bad")
    assert ran.code == 7 and "the GPU burns" in ran.err
    assert (
        engine.tags(f"mtb/{product.name}") == before
        and engine.layers(f"mtb/{product.name}:current") == current
    )


def test_a_cuda_image_must_see_a_gpu_unless_the_server_is_said_to_have_none(
    product: Any, engine: Engine, install: Callable, tmp_path: Path
) -> None:
    """The engine promises a GPU by CDI, and the container has none."""
    prove = (
        '#!/bin/sh\ncase "$*" in *--expect-gpu*) echo no GPU is visible >&2; exit 1 ;; esac\n'
        f"echo '{product.prove_says}'\n"
    )
    product.contents["config"] = {"bin/prove": prove.encode()}
    product.pack(tmp_path / "b", line=CU130)
    without_devices = (
        'for a; do shift; case $a in --device | nvidia.com/gpu=*) ;; *) set -- "$@" "$a" ;;'
        f' esac; done\nexec {shutil.which(engine.program)} "$@"\n'
    )
    script(tmp_path / "bin", "engine", without_devices)
    environment = engine.environment | {"DOCKER": str(tmp_path / "bin/engine")}
    ran = install(tmp_path / "b", "--force", **environment)
    assert ran.code == 7 and "no GPU is visible" in ran.err and "as it was before" in ran.err
    assert engine.tags(f"mtb/{product.name}") == set()
    ran = install(tmp_path / "b", "--gpus", "none", **environment)
    assert ran.code == 0, ran.out + ran.err


def test_an_engine_that_does_not_see_the_servers_folder_is_found_out_by_one_mount(
    tiny: Any, modern: Callable[[str], Engine], install: Callable, tmp_path: Path
) -> None:
    """As Docker from snap, or one of another machine; this one sees /tmp and nothing else."""
    tiny.name = f"t{uuid.uuid4().hex[:10]}"
    tiny.with_python().pack(tmp_path / "b")
    engine, prefix = modern("overlay2"), Path(f"/var/tmp/milktea-{tiny.name}")
    try:
        ran = install(tmp_path / "b", prefix=prefix, **engine.environment)
        assert ran.code == 3 and "the engine does not see" in ran.err
        assert "as it was before" in ran.err and f"may read {prefix}" in ran.err
        assert engine.tags(f"mtb/{tiny.name}") == set()
    finally:
        shutil.rmtree(prefix, ignore_errors=True)


def killed_runs(
    product: Any, engine: Engine, tmp_path: Path, seeds: range, update: bool = False
) -> None:
    """Install, killed -9 with everything that it started, at a random moment; then once more to the
    end.
    """
    before = present(product)
    product.add_model().pack(tmp_path / "v1", Options(release=1, volume_bytes=250_000))
    if update:
        new_wheel(product)
        product.pack(tmp_path / "v2", Options(release=2, base=before))
    repository, at = f"mtb/{product.name}", tmp_path / ("v2" if update else "v1")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | engine.environment
    for seed in seeds:
        prefix = tmp_path / f"p{seed}"
        if update:
            first = ["sh", str(tmp_path / "v1/INSTALL.sh"), "--prefix", str(prefix)]
            subprocess.run(first, env=environment, capture_output=True, check=True)
        earlier = engine.tags(repository) - {"current"}
        command = ["sh", str(at / "INSTALL.sh"), "--prefix", str(prefix)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(random.Random(seed).uniform(0.2, 6.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        again = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert again.returncode == 0, (seed, again.stdout, again.stderr)
        assert engine.layers(f"{repository}:current") == product.made().image.diff_ids
        roles = {"current", "previous"} if update else {"current"}
        assert engine.tags(repository) == {
            *roles,
            *earlier,
            final_tag(product.made().image).partition(":")[2],
        }
        assert not list((prefix / "state").glob("work.*")) and not list(
            prefix.glob("models/.part*")
        )
        for tag in engine.tags(repository):
            engine.docker("rmi", "-f", f"{repository}:{tag}", check=False)


def test_killed_at_any_moment_and_started_again_it_finishes(
    product: Any, engine: Engine, tmp_path: Path
) -> None:
    killed_runs(product, engine, tmp_path, range(2))


def test_an_update_killed_at_any_moment_and_started_again_finishes(
    product: Any, engine: Engine, tmp_path: Path
) -> None:
    killed_runs(product, engine, tmp_path, range(10, 12), update=True)
