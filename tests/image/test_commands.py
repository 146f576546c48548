"""What our texts tell people to type exists: verbs, options, targets, the installer's commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer

from ops.cli import app, image
from ops.errors import ConfigError
from ops.image import carry
from ops.image.fetch.debian import Mirrors
from ops.image.spec.definition import read
from ops.image.spec.paths import Places
from trainer.wire.stages import STAGES

ROOT = Path(__file__).parents[2]
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/troubleshooting.md",
    *sorted(ROOT.glob("docker/README.md")),
    *sorted(ROOT.glob("docs/airgap.md")),
    *sorted(ROOT.glob("docker/*/*/Dockerfile")),
    *sorted(ROOT.glob("ops/**/*.py")),
    *sorted(ROOT.glob("ops/image/server/*.txt")),
    *sorted(ROOT.glob("images/*.toml")),
]
MAKE = re.compile(
    r"`make ([a-z-]+)|make ([a-z-]+) (?:IMAGE|JOB|RUN|WITH|KEY|REGISTRY|SINCE|N|INVENTORY)="
)
IMAGE = re.compile(r"milktea image ([a-z-]+)((?: (?:--[a-z-]+|[A-Z_]+|\{[^}]*\}|[a-z0-9-]+))*)")
VERB = re.compile(r"""(?:`|hint=f?"|Next: )milktea ([a-z][a-z-]*)""")
INSTALL = re.compile(r"sh INSTALL\.sh ([a-z]+)\b")


def said(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """Every match in every text, with the file's name."""
    return [
        (str(path.relative_to(ROOT)), *(g or "" for g in found.groups()))
        for path in TEXTS
        for found in pattern.finditer(path.read_text())
    ]


def test_every_make_target_that_a_text_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [(path, one or two) for path, one, two in said(MAKE)]
    assert len(named) > 30
    assert [x for x in named if x[1] not in targets] == []


def test_every_verb_of_milktea_image_that_a_text_names_exists_with_its_options() -> None:
    commands = typer.main.get_command(image.app).commands  # type: ignore[attr-defined]
    named = said(IMAGE)
    assert len(named) > 8 and {"base", "keygen", "fetch"} <= {verb for _, verb, _ in named}
    for path, verb, rest in named:
        assert verb in commands, (path, verb)
        known = {
            option
            for parameter in commands[verb].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (path, verb, rest)


def test_every_verb_of_milktea_that_a_text_names_exists() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    named = said(VERB)
    assert len(named) > 5
    assert [x for x in named if x[1] not in commands and x[1] != "image"] == []


def test_every_command_of_the_installer_that_a_text_names_exists() -> None:
    usage = (ROOT / "ops/image/server/INSTALL.sh").read_text()
    [known] = re.findall(r"^ +(install \| [a-z| ]+)\) COMMAND", usage, re.MULTILINE)
    named = said(INSTALL)
    assert len(named) > 5
    assert [x for x in named if x[1] not in known.split(" | ")] == []


def test_a_mirror_of_debian_is_taken_from_the_environment_and_one_that_is_none_is_refused() -> None:
    here = Mirrors.of_this_host()
    chosen = Mirrors.given({"MILKTEA_DEBIAN_MIRROR": "https://mirror.example/debian"})
    assert chosen == Mirrors("https://mirror.example/debian", here.security)
    assert Mirrors.given({"MILKTEA_DEBIAN_SECURITY_MIRROR": "https://m.example/s"}) == Mirrors(
        here.debian, "https://m.example/s"
    )
    assert Mirrors.given({}) == here
    with pytest.raises(ConfigError, match="no mirror"):
        Mirrors.given({"MILKTEA_DEBIAN_MIRROR": "mirror.example"})


def test_every_image_that_a_document_names_has_todays_version() -> None:
    today = {path.stem: read(path).version for path in (ROOT / "images").glob("*.toml")}
    named = said(re.compile(r"milktea/(practice|train-cu\d+):(\d+)"))
    assert len(named) > 3
    assert [x for x in named if x[0].startswith("docs/") and int(x[2]) != today[x[1]]] == []


def test_a_bundle_carries_every_page_every_key_of_a_job_and_an_example_of_each_stage() -> None:
    carried = carry._documents(Places())
    assert {path.name for path in (ROOT / "docs").glob("*.md")} < set(carried)
    jobs = {name: path.read_text() for name, path in carried.items() if path.suffix == ".toml"}
    known = jobs.pop("reference.toml")
    assert {tomllib.loads(text).get("stage", "sft") for text in jobs.values()} == set(STAGES)
    assert [stage for stage in STAGES if stage not in known] == []


@pytest.mark.parametrize(("script", "most"), [("INSTALL.sh", 700), ("milktea-run.sh", 400)])
def test_the_scripts_of_the_server_stay_short_enough_to_be_read(script: str, most: int) -> None:
    assert len((ROOT / "ops/image/server" / script).read_text().splitlines()) <= most
