"""Building by Dockerfile: the same layers whenever and on whatever Debian they are built. Needs
Docker.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from image_engines import Engine
from image_world import forget, make_world

from ops.errors import MilkteaError
from ops.image import carry, workflow
from ops.image.build import context, engine, export
from ops.image.build.layers import write_layer
from ops.image.bundle.archive import Image
from ops.image.spec.lock import Lock
from ops.image.spec.paths import Places

BASE = os.environ.get("MILKTEA_BASE", "base:bookworm")
pytestmark = pytest.mark.timeout(900)  # a build waits for whatever else this machine does


@pytest.fixture
def client():
    try:
        return engine.connect()
    except MilkteaError as error:
        pytest.skip(str(error))


def entries(image: Image) -> list[list[tuple]]:
    """Of each layer: path, type, mode, owner, time, link, sha256 of the content."""
    found = []
    for layer in image.layers:
        assert layer.path is not None
        with tarfile.open(layer.path) as tar:
            rows = []
            for x in tar:
                file = tar.extractfile(x) if x.isreg() else None
                digest = hashlib.sha256(file.read()).hexdigest() if file else ""
                rows.append(
                    (x.name, x.type, oct(x.mode), x.uid, x.gid, x.mtime, x.linkname, digest)
                )
            found.append(rows)
    return found


def built(name: str, places: Places, base: str, cached: bool = False) -> tuple[Image, Lock]:
    """The image as it is carried, built anew."""
    spec, lock = workflow.define(name, places), workflow.read_lock(name, places)
    context.lay_out(lock, places)
    command = [engine.docker_with_buildkit(), "build", "--network=none", f"--build-arg=BASE={base}"]
    command += [
        "--build-arg=PIP_NO_INDEX=1",
        "-t",
        spec.tag,
        "-f",
        f"docker/{spec.dockerfile}/Dockerfile",
    ]
    command += [] if cached else ["--no-cache"]
    subprocess.run(
        [*command, "."],
        cwd=places.root,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
        check=True,
        capture_output=True,
    )
    return workflow.take(name, places)


@pytest.fixture
def places(tmp_path, client):
    yield make_world(tmp_path / "world")
    forget(client, "milktea/tiny:3")


def test_every_spelling_of_a_tar_gives_the_same_layer(tmp_path):
    """Order, owners' names, times, kinds of header, devices and marks of the engine do not matter;
    a capability does.
    """
    content = {"a/b": b"1", "a-c": b"22", "a": None, "a/link": "b"}

    def spelt(path: Path, names: list[str], **more: object) -> Path:
        form = more.pop("form", tarfile.GNU_FORMAT)
        with tarfile.open(path, "w", format=form) as tar:
            for name in names:
                member = tarfile.TarInfo(str(more.get("prefix", "")) + name)
                data = content[name]
                member.mtime, member.uname = int(more.get("mtime", 5)), str(more.get("uname", ""))
                if data is None:
                    member.type, member.mode = tarfile.DIRTYPE, 0o755 | int(more.get("bits", 0))
                elif isinstance(data, str):
                    member.type, member.linkname = tarfile.SYMTYPE, data
                else:
                    member.size = len(data)
                member.pax_headers = dict(more.get("pax", {}))
                tar.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
        return path

    def layer(path: Path) -> str:
        with path.open("rb") as raw:
            return write_layer(raw, 77, tmp_path).sha256

    plain = layer(spelt(tmp_path / "1", ["a", "a/b", "a/link", "a-c"]))
    odd = {"SCHILY.xattr.user.overlay.origin": "x", "mtime": "5.25"}
    other = spelt(
        tmp_path / "2",
        ["a-c", "a/link", "a/b", "a"],
        form=tarfile.PAX_FORMAT,
        mtime=9,
        uname="root",
        prefix="./",
        bits=0o40000,
        pax=odd,
    )
    assert layer(other) == plain
    with tarfile.open(tmp_path / "2", "a") as tar:  # older engines leave it a device
        tar.addfile(tarfile.TarInfo("./dev/null"))
    assert layer(tmp_path / "2") == plain
    able = spelt(
        tmp_path / "3",
        ["a", "a/b", "a/link", "a-c"],
        form=tarfile.PAX_FORMAT,
        pax={"SCHILY.xattr.security.capability": "cap"},
    )
    assert layer(able) != plain


def test_layers_are_named_by_what_their_run_told_milktea_settle():
    history = [
        {"created_by": "COPY / / # buildkit"},
        {"created_by": "ENV X=1", "empty_layer": True},
        {"created_by": "RUN /bin/sh -euc pip install; milktea-settle torch # buildkit"},
        {"created_by": "RUN echo"},
        {"created_by": "RUN milktea-settle torch"},
    ]
    config = {"history": history, "rootfs": {"diff_ids": ["a", "b", "c", "d"]}}
    assert export.layer_names(config) == ["debian", "torch", "layer-03", "torch-04"]


@pytest.mark.docker
@pytest.mark.slow
def test_two_builds_without_a_cache_have_the_same_files_and_the_same_bytes(places):
    one, lock = built("tiny", places, BASE)
    files = entries(one)
    two, _ = built("tiny", places, BASE)
    assert entries(two) == files
    assert (two.config_digest, two.manifest_digest) == (one.config_digest, one.manifest_digest)
    assert [layer.name for layer in one.layers] == ["debian", "box", "torch", "trainer"]
    assert {row[5] for layer in files for row in layer} == {lock.epoch}
    names = [row[0] for row in files[2]]
    assert "opt/link" in names and "opt/hard" in names
    assert "opt/trainer/wire/job.py" in [row[0] for row in files[3]], "sub-packages too"


@pytest.mark.docker
@pytest.mark.slow
def test_another_engine_builds_the_same_files_and_the_same_bytes(
    places: Places, modern: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = built("tiny", places, BASE)
    files = entries(one)
    other = modern("overlay2")
    with subprocess.Popen(["docker", "save", BASE], stdout=subprocess.PIPE) as base:
        environment = os.environ | other.environment
        subprocess.run(["docker", "load", "-q"], stdin=base.stdout, env=environment, check=True)
    monkeypatch.setenv("DOCKER_HOST", other.host)
    versions = {engine.connect().version()["Version"]}
    two, _ = built("tiny", places, BASE)
    pairs = zip(files, entries(two), strict=True)
    assert [sorted({*here} ^ {*there}) for here, there in pairs] == [[]] * len(files)
    assert two.config_digest == one.config_digest
    monkeypatch.undo()
    assert engine.connect().version()["Version"] not in versions, "they are two engines"


@pytest.mark.docker
@pytest.mark.slow
def test_a_change_of_the_trainer_rebuilds_and_changes_its_layer_alone(places):
    one, _ = built("tiny", places, BASE)
    # other words each time: the engine's cache remembers the test before
    (places.root / "trainer" / "launch.py").write_text(f"print('{os.urandom(8).hex()}')\n")
    lines: list[str] = []
    workflow.build("tiny", places, lines.append, base=BASE)
    two, _ = workflow.take("tiny", places)
    changed = [x.name for x, y in zip(one.layers, two.layers, strict=True) if x != y]
    assert changed == ["trainer"]
    steps = {line.split()[0] for line in lines if "RUN" in line or "COPY" in line}
    cached = {line.split()[0] for line in lines if line.endswith("CACHED")}
    assert len(steps - cached) == 1, "one step ran"


@pytest.mark.docker
@pytest.mark.slow
def test_the_config_says_how_a_container_starts_and_nothing_of_this_machine(places):
    image, lock = built("tiny", places, BASE)
    config = json.loads(image.config_json_bytes)
    assert config["config"]["Entrypoint"] == ["/bin/sh"]
    assert config["config"]["Labels"] == {"milktea.wire": "1"}
    assert config["created"] == "2025-05-20T00:00:00Z"
    assert str(places.root) not in json.dumps(config)
    assert lock.identity is not None and lock.identity.config_digest == image.config_digest


@pytest.mark.docker
@pytest.mark.slow
def test_an_image_made_from_ours_in_a_shell_is_carried_under_its_own_name(places, client):
    workflow.build("tiny", places, base=BASE)
    made = client.containers.run("milktea/tiny:3", ["-c", "echo mine >/opt/mine"], detach=True)
    made.wait()
    made.commit("mine", "1")
    made.remove()
    try:
        found = carry.bundle(
            "tiny", places.root / "out", places=places, signed=False, proved=False, image="mine:1"
        )
    finally:
        forget(client, "mine:1")
    plan = (places.root / "out" / "PLAN").read_text()
    assert "name mine\n" in plan and "ref milktea/mine:" in plan and found.carried_layers == 5


@pytest.mark.docker
@pytest.mark.slow
def test_an_image_over_its_budget_is_refused_with_the_bytes(places):
    workflow.build("tiny", places, base=BASE)
    _, whole = workflow.take("tiny", places)
    torch = next(layer for layer in whole.layers if layer.name == "torch")
    budget = places.budget("tiny")
    budget.write_text(
        f"image_bytes = {whole.size_bytes}\n[layers]\ntorch = {torch.size_bytes - 1}\n"
    )
    with pytest.raises(MilkteaError, match=f"torch has {torch.size_bytes:,} bytes, 1 more than"):
        workflow.take("tiny", places)


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.skipif(
    "MILKTEA_TWICE" not in os.environ, reason="the long proof: MILKTEA_TWICE=practice"
)
@pytest.mark.timeout(3600)
def test_a_real_image_on_another_debian_differs_in_the_layer_of_debian_at_most():
    name = os.environ["MILKTEA_TWICE"]
    try:
        workflow.fetch(name)
        other = workflow.make_base(name)
    except MilkteaError as error:
        pytest.skip(f"{error} ({error.hint})")
    one, _ = built(name, Places(), BASE)
    two, _ = built(name, Places(), other)
    assert [x.diff_id for x in two.layers[1:]] == [x.diff_id for x in one.layers[1:]]
    differing = {a[0] for a, b in zip(entries(one)[0], entries(two)[0], strict=False) if a != b}
    print(f"Debian's layer differs in {len(differing)} entries:", *sorted(differing)[:20], sep="\n")


@pytest.mark.docker
@pytest.mark.slow
def test_an_image_that_does_not_prove_itself_is_not_bundled(places):
    workflow.build("tiny", places, base=BASE)
    with pytest.raises(MilkteaError, match="does not prove itself"):
        carry.bundle("tiny", places.root / "out", places=places, signed=False)
    assert not (places.root / "out").exists()


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["practice", "train-cu126", "train-cu130"])
def test_each_image_proves_itself_on_the_cpu(name, client):
    """Real steps in fp32 and bf16, Triton's machine code, bitsandbytes: of images built here."""
    try:
        engine.image_id(client, workflow.define(name).tag)
    except MilkteaError as error:
        pytest.skip(f"{error} ({error.hint})")
    workflow.prove(name)
