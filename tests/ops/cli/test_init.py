"""`milktea init`: the job file that it writes is one that `milktea plan` takes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import rig
from ops import api
from ops.cli.app import app
from ops.cli.data import typed_paths
from ops.cli.errors import errors
from ops.errors import PreflightError
from ops.fakevast import FakeVast
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.wait import RealClock

PRACTICE = Path(__file__).parents[3] / "trainer" / "practice" / "practice_model"
ROWS = [{"instruction": f"question {n}?", "input": "", "output": f"answer {n}"} for n in range(40)]
PAIRS = [{"prompt": f"question {n}?", "chosen": "yes", "rejected": "no"} for n in range(40)]
TAGGED = [row | {"kto_tag": n % 2 == 0} for n, row in enumerate(ROWS)]
TEXTS = [{"text": f"text {n} of the library, " * 20} for n in range(40)]
TEN = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-8B-Base",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "google/gemma-3-1b-it",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "zai-org/GLM-4.7-Flash",
)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vast]:
    with FakeVast(tmp_path_factory.mktemp("fakevast")) as cloud:
        yield Vast(Provider(cloud.url, cloud.api_key), RealClock(rig.PACE))


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def init(folder: Path, *words: str | Path, rows: list[dict] = ROWS) -> Result:
    data = written(folder / "My Rows.jsonl", rows)
    to = folder / "jobs" / "job.toml"
    return CliRunner().invoke(app, ["init", str(data), "--to", str(to), *map(str, words)])


@pytest.mark.parametrize("base", TEN)
def test_the_job_for_a_model_of_today_is_planned_without_a_network(
    base: str, tmp_path: Path, market: Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    done = init(tmp_path, "--base", base, "--max-usd", "20")
    assert done.exit_code == 0, done.output
    file = tmp_path / "jobs" / "job.toml"
    planned = api.plan(file, vast=market, root=tmp_path / "runs", or_estimate=True)
    assert planned.ranking.accepted and planned.plan.max_usd == 20
    assert planned.plan.run_id.startswith("my-rows-")


@pytest.mark.parametrize(
    ("stage", "rows"), [("sft", ROWS), ("dpo", PAIRS), ("kto", TAGGED), ("pt", TEXTS)]
)
def test_the_stage_follows_from_the_rows(
    stage: str, rows: list[dict], tmp_path: Path, market: Vast
) -> None:
    done = init(tmp_path, "--base", PRACTICE, "--max-usd", "1", rows=rows)
    assert done.exit_code == 0, done.output
    file = tmp_path / "jobs" / "job.toml"
    assert tomllib.loads(file.read_text("utf-8"))["stage"] == stage
    planned = api.plan(file, vast=market, root=tmp_path / "runs")
    assert planned.ranking.accepted


def test_of_a_model_in_a_folder_memory_is_known_and_tokens_are_counted(
    tmp_path: Path, market: Vast
) -> None:
    rows = [row | {"output": "翡翠鹦鹉" * 50} for row in ROWS]  # bytes to this small vocabulary
    done = init(tmp_path, "--base", PRACTICE, "--max-usd", "1", rows=rows)
    assert done.exit_code == 0 and "fp32: milktea's practice model" in done.output, done.output
    planned = api.plan(tmp_path / "jobs" / "job.toml", vast=market, root=tmp_path / "runs")
    assert not [note for note in planned.plan.notes if "left out" in note]


def test_the_practice_model_gets_the_image_that_trains_it_here(tmp_path: Path) -> None:
    assert init(tmp_path, "--base", PRACTICE, "--max-usd", "1").exit_code == 0
    job = tomllib.loads((tmp_path / "jobs" / "job.toml").read_text("utf-8"))
    ours = tomllib.loads((PRACTICE.parents[2] / "jobs" / "practice.toml").read_text("utf-8"))
    assert job["image"] == ours["image"]
    assert job["model"]["precision"] == ours["model"]["precision"] == "fp32"
    assert job["training"]["learning_rate"] == ours["training"]["learning_rate"]


LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (LLAMA_8B, 0, "precision bf16: needs "),
        (LLAMA_8B | {"num_hidden_layers": 64}, 0, "precision nf4: needs "),
        (LLAMA_8B | {"num_hidden_layers": 4000}, 3, "no known card has it"),
        ([], 0, "its memory is not known"),
    ],
)
def test_a_model_folder_tells_its_size_and_whether_it_talks(
    config: object, code: int, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config.json").write_text(json.dumps(config))
    done = init(tmp_path, "--base", folder, "--max-usd", "9")
    assert done.exit_code == code and said in done.output, done.output
    if code == 0:
        job = tomllib.loads((tmp_path / "jobs" / "job.toml").read_text("utf-8"))
        assert job["data"]["template"] == "chat" and "image" not in job


def test_held_out_rows_stand_in_the_job(tmp_path: Path, market: Vast) -> None:
    held = written(tmp_path / "held.jsonl", [row | {"input": "held"} for row in ROWS[:5]])
    done = init(tmp_path, "--base", PRACTICE, "--max-usd", "1", "--held-out", held)
    assert done.exit_code == 0, done.output
    file = tmp_path / "jobs" / "job.toml"
    assert tomllib.loads(file.read_text("utf-8"))["data"]["held_out"] == "../held.jsonl"
    assert api.plan(file, vast=market, root=tmp_path / "runs").ranking.accepted


def test_what_is_not_sound_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    bad = init(tmp_path, "--base", "Qwen/Qwen3-8B", "--max-usd", "1", rows=[*ROWS, {"a": "b"}])
    assert bad.exit_code == 3 and "data check" in bad.output
    folder = tmp_path / "huge"
    folder.mkdir()
    huge = {"model_type": "llama", "hidden_size": 32768, "num_hidden_layers": 128}
    huge |= {"num_attention_heads": 256, "intermediate_size": 98304, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(huge))
    large = init(tmp_path, "--base", folder, "--max-usd", "1")
    assert large.exit_code == 3 and "no known card" in large.output
    unasked = init(tmp_path, "--max-usd", "1")
    assert unasked.exit_code == 2 and "--base" in unasked.output
    assert not (tmp_path / "jobs").exists()


def test_of_few_rows_so_many_steps_are_made_that_something_is_learned(
    tmp_path: Path, market: Vast
) -> None:
    assert init(tmp_path, "--base", PRACTICE, "--max-usd", "1").exit_code == 0
    file = tmp_path / "jobs" / "job.toml"
    text = file.read_text("utf-8")
    job = tomllib.loads(text)
    assert (job["training"]["num_train_epochs"], job["training"]["batch_size"]) == (3, 4)
    assert "30 steps in all" in text
    few = "hardly anything is learned"
    planned = api.plan(file, vast=market, root=tmp_path / "runs")
    assert few not in "".join(planned.plan.notes)
    job = {"model": {"base": str(PRACTICE), "precision": "fp32"}, "image": job["image"]}
    job |= {"name": "few", "data": {"files": [str(tmp_path / "My Rows.jsonl")]}}
    job |= {"limits": {"max_usd": 1}}
    planned = api.plan(job, vast=market, root=tmp_path / "runs")
    assert f"2 steps in all: {few}" in "\n".join(planned.plan.notes)


def test_a_misspelt_model_is_told_with_the_nearest_one(tmp_path: Path, market: Vast) -> None:
    done = init(tmp_path, "--base", "Qwen/Qwen3-8", "--max-usd", "1")
    assert done.exit_code == 0 and "did you mean Qwen/Qwen3-8B?" in done.output
    file = tmp_path / "jobs" / "job.toml"
    with pytest.raises(PreflightError) as refused:
        api.plan(file, vast=market, root=tmp_path / "runs", or_estimate=True)
    assert "did you mean Qwen/Qwen3-8B?" in refused.value.hint


def test_rows_that_are_all_too_long_are_told_with_what_makes_them_fit(
    tmp_path: Path, market: Vast
) -> None:
    rows = [{"instruction": "a", "output": "b" * 20_000}]
    assert init(tmp_path, "--base", PRACTICE, "--max-usd", "1", rows=rows).exit_code == 0
    with pytest.raises(PreflightError) as refused:
        api.plan(tmp_path / "jobs" / "job.toml", vast=market, root=tmp_path / "runs")
    assert "data.over_length" in refused.value.hint and not any((tmp_path / "runs").iterdir())


def test_the_next_command_can_be_pasted_where_the_shell_does_not_find_milktea(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "milktea").touch()
    folder = tmp_path / "my rows"
    folder.mkdir()
    done = init(folder, "--base", "Qwen/Qwen3-8B", "--max-usd", "1")
    job = folder / "jobs" / "job.toml"
    assert f"`{tmp_path}/bin/milktea plan '{job}'` shows" in done.output
    refused = init(
        folder, "--base", "Qwen/Qwen3-8B", "--max-usd", "1", "--force", rows=[{"a": "b"}]
    )
    assert f"`{tmp_path}/bin/milktea data check '" in refused.output


def test_bad_rows_are_told_with_the_command_and_may_be_left_out(tmp_path: Path) -> None:
    words = ["--base", "Qwen/Qwen3-8B", "--max-usd", "1"]
    rows = [*ROWS, {"instruction": "open?", "output": ""}]
    refused = init(tmp_path, *words, rows=rows)
    assert refused.exit_code == 3 and f"data check '{tmp_path / 'My Rows.jsonl'}'" in refused.output
    done = init(tmp_path, *words, "--drop-bad", rows=rows)
    assert done.exit_code == 0 and "1 row left out" in done.output
    job = tomllib.loads((tmp_path / "jobs" / "job.toml").read_text("utf-8"))
    assert job["data"]["bad_rows"] == "drop"


@pytest.mark.parametrize("typed", ["{}", "'{}' ", "{}  ", "{b} "])
def test_a_file_that_is_dropped_on_the_terminal_is_found(typed: str, tmp_path: Path) -> None:
    data = written(tmp_path / "it's mine.jsonl", ROWS)
    if "'" in typed:
        data = data.rename(tmp_path / "my rows.jsonl")
    escaped = str(data).replace(" ", "\\ ").replace("'", "\\'")
    assert typed_paths(typed.format(data, b=escaped)) == [data]


def test_results_go_to_out_of_the_working_directory_wherever_the_job_lies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--base", "Qwen/Qwen3-8B", "--max-usd", "1"]
    monkeypatch.chdir(tmp_path)
    assert init(Path(), *words).exit_code == 0
    assert api.load_job("jobs/job.toml").results.folder == tmp_path / "out"


def test_a_job_that_exists_is_not_written_over(tmp_path: Path) -> None:
    words = ["--base", "Qwen/Qwen3-8B", "--max-usd", "1"]
    assert init(tmp_path, *words).exit_code == 0
    file = tmp_path / "jobs" / "job.toml"
    file.write_text("mine", "utf-8")
    again = init(tmp_path, *words)
    assert again.exit_code == 2 and file.read_text("utf-8") == "mine"
    assert init(tmp_path, *words, "--force").exit_code == 0


def test_a_question_that_is_left_by_ctrl_c_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, errors(as_json=False):
        raise typer.Abort  # what Typer's prompts make of Ctrl-C and Ctrl-D
    assert ended.value.exit_code == 130 and "nothing more was done" in capsys.readouterr().err


def test_columns_and_the_reason_for_each_choice_stand_in_the_file(tmp_path: Path) -> None:
    rows = [{"q": "why?", "a": "because"}]
    words = ["--column", "instruction=q", "--column", "output=a", "--max-usd", "1"]
    assert init(tmp_path, "--base", "Qwen/Qwen3-32B", *words, rows=rows).exit_code == 0
    text = (tmp_path / "jobs" / "job.toml").read_text("utf-8")
    assert tomllib.loads(text)["data"]["columns"] == {"instruction": "q", "output": "a"}
    assert 'precision = "nf4"  # needs' in text
    assert max(map(len, text.splitlines())) <= 120
