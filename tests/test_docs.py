"""What our pages promise is what the code does, and what they tell people to type exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import milktea
from ops import errors
from ops.box import scripts
from ops.cli.app import app
from ops.job.config import keys

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
NOT_OF_AN_ERROR = {0, 1, 130}  # done, a fault of ours, interrupted


def rows(title: str) -> list[list[str]]:
    """The cells of the table under this heading, without its head."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1:]]


def test_the_table_of_exit_codes_has_every_code_once() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.MilkteaError)}
    told = [int(code) for code, _ in rows("Exit codes")]
    assert len(told) == len(set(told)) and set(told) == codes | NOT_OF_AN_ERROR


@pytest.mark.parametrize("what, ends", rows("What could keep billing, and what ends it"))
def test_what_ends_a_bill_is_named_as_the_code_has_it(what: str, ends: str) -> None:
    assert what and ends
    for limit in re.findall(r"`(limits\.\w+)`", ends):
        assert limit in keys()
    if "minutes of silence" in ends:
        assert f"after {scripts.LEASE_S // 60} minutes of silence" in ends


def typed(text: str) -> list[list[str]]:
    """The words behind `milktea` of each command in a page: in its blocks, and between backquotes.
    A form's brackets are left out, so that what may be typed is there too."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    found = [re.match(r"(?:\$ )?(?:\.venv/bin/)?milktea ([^#]*)", line.strip()) for line in lines]
    return [shlex.split(re.sub(r"[][\n]", " ", match[1])) for match in found if match]


def test_every_command_that_a_page_names_exists_with_its_options() -> None:
    commands = [(page.name, words) for page in PAGES for words in typed(page.read_text("utf-8"))]
    assert len(commands) > 60
    milktea_itself: Any = typer.main.get_command(app)
    for page, words in commands:
        command, rest = milktea_itself, list(words)
        while rest and rest[0] not in ("...", "WORD") and hasattr(command, "commands"):
            if rest[0].startswith("-"):
                break
            assert rest[0] in command.commands, f"{page}: milktea {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        wanted = {word for word in rest if re.match(r"--?[a-z]", word)}
        assert wanted <= known, f"{page}: {command.name} has no {wanted - known}"


def test_every_python_program_in_a_page_is_one_and_what_it_calls_of_milktea_is_there() -> None:
    names = set()
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    names |= {node.attr} if node.value.id == "milktea" else set()
    assert len(names) > 5
    assert [name for name in sorted(names) if not hasattr(milktea, name)] == []
