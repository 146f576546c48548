from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ops.errors import ConfigError
from ops.job import config
from trainer.data.files import read_rows
from trainer.data.sources import Reading
from trainer.wire.stages import Sections

JOBS = sorted((Path(__file__).parents[3] / "jobs").glob("*.toml"))
RECIPES = Path(__file__).parents[3] / "jobs/recipes"
LEAST = {
    "name": "x",
    "model": {"base": "a/b"},
    "data": {"files": ["d.json"]},
    "limits": {"max_usd": 1},
}


def refused(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, Path("job.toml"))
    return str(caught.value)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_example_parses_and_fits_the_exported_schema(path: Path) -> None:
    assert len(JOBS) >= 4
    config.load(path)
    jsonschema.validate(tomllib.loads(path.read_text()), config.schema())


def test_every_recipe_parses_and_says_what_its_authors_did() -> None:
    recipes = sorted(RECIPES.glob("*.toml"))
    assert len(recipes) == 7
    for path in recipes:
        assert config.load(path).name == path.stem
        assert "authors" in path.read_text() or "original" in path.read_text(), path.name


def test_the_recipes_scripts_write_rows_that_are_read(tmp_path: Path) -> None:
    chat, script = tmp_path / "chat.json", tmp_path / "script.txt"
    chat.write_text(json.dumps([{"input": ["Hi", "And you?"], "output": ["Hello", "Fine"]}]))
    script.write_text("TOM: Who are you?\nHERO: Your captain.\n(a storm)\nHERO: To the boats!\n")
    asked = {"chinese_vicuna_chat.py": [chat], "character_rows.py": [script, "HERO"]}
    found = {}
    for name, words in asked.items():
        command = [sys.executable, "-W", "ignore", RECIPES / name, *words]
        rows = tmp_path / f"{name}.jsonl"
        rows.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
        read, defects = read_rows([(rows, rows.name)], Reading())
        assert not defects
        found[name] = [[turn.text for turn in row.turns] for row in read]
    assert found["chinese_vicuna_chat.py"] == [["Hi", "Hello", "And you?", "Fine"]]
    assert found["character_rows.py"] == [["Who are you?", "Your captain."]]


def test_the_reference_names_every_key_there_is_and_no_other() -> None:
    text = (Path(__file__).parents[3] / "jobs/reference.toml").read_text()
    named, section = set(), ""
    for line in text.splitlines():
        if head := re.match(r"(?:# )?\[(\w+)\]", line):
            section = head[1] + "."
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            named.add(section + key[1])
    assert named == set(config.keys())
    own = {*Sections.model_fields, "prompt_learning"}  # of one stage, or of one kind of method
    assert len({key for key in named if key.split(".")[0] not in own}) <= 92


def test_a_section_of_another_stage_is_refused() -> None:
    assert "[pt] says nothing to stage sft" in refused(LEAST | {"pt": {"overlap": 4}})
    config.parse(LEAST | {"pt": {}}, Path("job.toml"))  # says nothing


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name() -> None:
    said = refused(LEAST | {"training": {"learning_rat": 1e-4}})
    assert "training.learning_rat: unknown key; did you mean training.learning_rate?" in said


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    assert "did you mean offer.countries?" in refused(
        LEAST | {"limits": {"max_usd": 1, "countries": ["DE"]}}
    )


def test_every_mistake_is_listed_at_once() -> None:
    said = refused(
        {"name": "Bad Name", "model": {"base": 3}, "data": {"files": []}, "limits": {"max_usd": -1}}
    )
    assert [line.split(": ")[1] for line in said.splitlines()] == [
        "name",
        "model.base",
        "data.files",
        "limits.max_usd",
    ]


def prompted(method: str, **told: Any) -> dict[str, Any]:
    """Keys of a job of this training.method; `told` is mostly [prompt_learning]."""
    precision, optim = told.pop("precision", "bf16"), told.pop("optim", "adamw")
    own = {k: told.pop(k) for k in ("lora", "stage", "start") if k in told}
    made = {"model": {"base": "a", "precision": precision}, "prompt_learning": told}
    return made | own | {"training": {"method": method, "optim": optim}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offer": {"bid_usd_per_hour": 0.2}}, "interruptible"),
        ({"offer": {"countries": ["Germany"]}}, "two-letter"),
        (
            {"training": {"method": "full"}, "model": {"base": "a", "precision": "nf4"}},
            "must be bf16, fp16 or fp32",
        ),
        (prompted("p_tuning", lora={"r": 8}), "[lora] says nothing"),
        (prompted("p_tuning", lora={"use_rslora": True}), "[lora] says nothing"),
        (prompted("p_tuning_v2", precision="fp8"), "a base in fp8 is not proven there"),
        (prompted("prefix_tuning", precision="nf4"), "a base in nf4 is not proven there"),
        (
            prompted("prompt_tuning", stage="dpo"),
            'stage dpo is trained by training.method = "lora"',
        ),
        (prompted("p_tuning", stage="ppo"), 'stage ppo is trained by training.method = "lora"'),
        (prompted("p_tuning", start="run"), "is in no file, only what it gives"),
        (prompted("p_tuning", optim="muon"), "an adapter is trained by"),
        (prompted("p_tuning_v2", encoder_hidden_size=8), "encoder_hidden_size says nothing"),
        (prompted("prompt_tuning", num_virtual_tokens=1025), "less than or equal to 1024"),
        (prompted("lora", num_virtual_tokens=8), "[prompt_learning] says nothing"),
        ({"training": {"batch_size": 1}, "offer": {"num_gpus": 2}}, "without a row"),
        ({"limits": {}}, "limits.max_usd: Field required"),
    ],
)
def test_contradictions_are_refused(change: dict, words: str) -> None:
    assert words in refused(LEAST | change)


def test_a_base_whose_name_no_disk_takes_is_refused_by_its_key() -> None:
    assert refused(LEAST | {"model": {"base": "9" * 5000}}).startswith("model.base: ")


def test_a_missing_file_and_broken_toml_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such job file"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML.*line 1"):
        config.load(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


@pytest.mark.parametrize("text", ["n = " + "9" * 5000, "n = " + "[" * 100_000, "n = '\udcff'"])
def test_toml_that_python_cannot_hold_says_which_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        config.load(tmp_path / "bad.toml")


def test_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    raw = LEAST | {
        "model": {"base": "model"},
        "data": {"files": ["d.json"], "template": "mine.txt"},
    }
    job = config.parse(raw, tmp_path / "job.toml")
    assert job.data.files == [tmp_path / "d.json"]
    assert job.data.template == str(tmp_path / "mine.txt")
    assert job.model.base == str(tmp_path / "model")


def test_the_schema_is_json_and_describes_itself() -> None:
    assert json.loads(json.dumps(config.schema()))["title"] == "milktea job"
