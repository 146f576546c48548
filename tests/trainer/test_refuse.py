"""Bad input is refused before the first step, all of it at once, with what to do next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import rows, write_model, write_tokenizer

from trainer.job import Job
from trainer.launch import main as launch
from trainer.prepare import Refused, prepare
from trainer.prompt import TemplateError
from trainer.train import ending

Make = Callable[..., Path]


def prepared(job: Path):
    return prepare(Job.model_validate_json(job.read_bytes()), job.parent)


def refused(job: Path) -> Refused | TemplateError:
    with pytest.raises((Refused, TemplateError)) as caught:
        prepared(job)
    return caught.value


LONG = [*rows(6), {"instruction": "x " * 300, "input": "", "output": "short"}, {"instruction": "short", "input": "", "output": "y " * 300}]


def test_every_defect_of_the_data_is_in_the_refusal(run_folder: Make) -> None:
    bad = [*rows(5), {"instruction": "a"}, {"instruction": "b", "output": ""}, *rows(3)]
    error = refused(run_folder(data=bad))
    assert "2 defects" in str(error)
    assert [s.split(": ")[0] for s in error.samples] == ["train.jsonl:6:1", "train.jsonl:7:32"]


def test_over_length_rows_are_refused_by_default_each_with_its_tokens(run_folder: Make) -> None:
    error = refused(limited(run_folder, "refuse"))
    assert "2 of 8 rows" in str(error) and [s.split(":")[1] for s in error.samples] == ["7", "8"] and "over_length" in error.hint


def limited(make: Make, policy: str) -> Path:
    job = make(data=LONG)
    settings = json.loads(job.read_text())
    settings["data"] |= {"max_length": 260, "over_length": policy}
    job.write_text(json.dumps(settings))
    return job


def test_dropping_over_length_rows_is_told_row_by_row(run_folder: Make) -> None:
    found = prepared(limited(run_folder, "drop")).rows
    assert len(found) == 6 and len(found.notes) == 2 and all("dropped" in n and n.startswith("train.jsonl:") for n in found.notes)


def test_truncation_keeps_the_stop_token_and_refuses_a_prompt_that_fills_the_budget(run_folder: Make) -> None:
    job = limited(run_folder, "truncate")
    error = refused(job)
    assert len(error.samples) == 1 and "prompt alone" in error.samples[0]
    settings = json.loads(job.read_text())
    kept = [row for row in LONG if not row["instruction"].startswith("x ")]
    again = run_folder(data=kept)
    changed = json.loads(again.read_text())
    changed["data"] |= {"max_length": 260, "over_length": "truncate"}
    again.write_text(json.dumps(changed | {"run_id": settings["run_id"]}))
    data = prepared(again)
    last = data.rows.ids[data.rows.starts[-2] :]
    assert len(last) == 260 and last[-1] == data.stop_id and data.rows.trained[-1]
    assert len(data.rows.notes) == 1 and "stop token kept" in data.rows.notes[0]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run_folder: Make, tmp_path: Path) -> None:
    write_model(tmp_path / "small", vocab_size=290)
    write_tokenizer(tmp_path / "small")
    error = refused(run_folder(model=tmp_path / "small"))
    assert "300 ids" in str(error) and "290" in str(error) and error.hint  # type: ignore[union-attr]


def test_a_template_whose_stop_token_this_tokenizer_lacks_is_refused(run_folder: Make, tmp_path: Path) -> None:
    job = run_folder()
    settings = json.loads(job.read_text())
    settings["data"] |= {"template": "mine", "template_text": 'user = "U: {user} A:"\nassistant = "{assistant}"\nstop = "<|end_of_turn|>"'}
    job.write_text(json.dumps(settings))
    assert "is" in str(refused(job)) and "eos" in str(refused(job))


def test_an_unknown_target_module_names_the_close_ones(run_folder: Make) -> None:
    end = ending(run_folder(lora={"target_modules": ["q_proj", "v_porj"]}))
    assert end.code == 3 and "'v_porj'" in str(end.error) and "v_proj" in str(end.error)


def test_a_precision_that_this_device_lacks_is_refused(run_folder: Make) -> None:
    job = run_folder()
    settings = json.loads(job.read_text())
    settings["model"]["precision"] = "fp8"
    job.write_text(json.dumps(settings))
    end = ending(job)
    assert end.code == 3 and 'model.precision = "fp32"' in str(end.error)


def test_data_that_changed_since_the_job_was_made_is_refused(run_folder: Make) -> None:
    job = run_folder()
    with open(job.parent / "data" / "train.jsonl", "a") as file:
        file.write('{"instruction": "late", "output": "row"}\n')
    assert "sha256" in str(refused(job))


def test_a_special_token_written_out_in_a_text_is_refused(run_folder: Make) -> None:
    error = refused(run_folder(data=[*rows(3), {"instruction": "close </s> it", "input": "", "output": "done"}]))
    assert "'</s>'" in error.samples[0] and "train.jsonl:4" in error.samples[0]


def test_a_model_folder_without_a_fast_tokenizer_is_refused(run_folder: Make, models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert "tokenizer.json" in str(refused(run_folder(model=tmp_path / "bare")))


def test_the_launcher_refuses_without_importing_torch_and_tells_it_in_the_events(run_folder: Make) -> None:
    import subprocess
    import sys

    job = run_folder(data=[{"instruction": "a"}])
    code = "import sys; from trainer.launch import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, str(job)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "train.jsonl:1" in done.stderr
    assert json.loads((job.parent / "events.jsonl").read_text())["event"] == "failed"


@pytest.mark.parametrize("text", ["{", '{"wire": 99}', '{"run_id": "x"}'])
def test_a_job_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    assert launch([str(tmp_path / "job.json")]) == 3


def test_the_cache_is_keyed_by_content_and_a_damaged_one_is_made_again(run_folder: Make) -> None:
    job = run_folder()
    first = prepared(job).rows
    cached = next((job.parent / "cache").glob("*.safetensors"))
    assert prepared(job).rows.ids.tolist() == first.ids.tolist()
    cached.write_bytes(cached.read_bytes()[:100])
    assert prepared(job).rows.ids.tolist() == first.ids.tolist()
    settings = json.loads(job.read_text())
    settings["data"]["template"] = "vicuna"
    job.write_text(json.dumps(settings))
    assert prepared(job).rows.ids.tolist() != first.ids.tolist() and len(list((job.parent / "cache").glob("*.safetensors"))) == 2
