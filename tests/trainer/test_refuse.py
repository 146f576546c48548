"""Bad input is refused before the first step, all of it at once, with what to do next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_world import write_model_tokenizer
from safetensors.numpy import load_file, save_file
from tiny import rows, write_model, write_tokenizer

from trainer.data.errors import InvalidJob
from trainer.data.prepare import prepare, prompt_ids
from trainer.data.template import TemplateError, Turn
from trainer.data.weights import validate_weights
from trainer.launch import main as launch
from trainer.outcome import report_refusal
from trainer.train import outcome_of
from trainer.wire.job import Job

Make = Callable[..., Path]


def prepared(job: Path):
    return prepare(Job.model_validate_json(job.read_bytes()), job.parent)


def refused(job: Path) -> InvalidJob | TemplateError:
    with pytest.raises((InvalidJob, TemplateError)) as caught:
        prepared(job)
    return caught.value


LONG = [
    *rows(6),
    {"instruction": "x " * 300, "input": "", "output": "short"},
    {"instruction": "short", "input": "", "output": "y " * 300},
]


def test_every_defect_of_the_data_is_in_the_refusal(run_folder: Make) -> None:
    bad = [*rows(5), {"instruction": "a"}, {"instruction": "b", "output": ""}, *rows(3)]
    error = refused(run_folder(data=bad))
    assert "2 defects" in str(error)
    assert [s.split(": ")[0] for s in error.samples] == ["train.jsonl:6:1", "train.jsonl:7:32"]


def test_over_length_rows_are_refused_by_default_each_with_its_tokens(run_folder: Make) -> None:
    error = refused(limited(run_folder, "refuse"))
    assert (
        "2 of 8 rows" in str(error)
        and [s.split(":")[1] for s in error.samples] == ["7", "8"]
        and "over_length" in error.hint
    )


def limited(make: Make, policy: str) -> Path:
    job = make(data=LONG)
    settings = json.loads(job.read_text())
    settings["data"] |= {"max_length": 260, "over_length": policy}
    job.write_text(json.dumps(settings))
    return job


def test_dropping_over_length_rows_is_told_row_by_row(run_folder: Make) -> None:
    found = prepared(limited(run_folder, "drop")).rows
    assert (
        len(found) == 6
        and len(found.notes) == 2
        and all("dropped" in n and n.startswith("train.jsonl:") for n in found.notes)
    )


def test_truncation_keeps_the_stop_token_and_refuses_a_prompt_that_fills_the_budget(
    run_folder: Make,
) -> None:
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


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    run_folder: Make, tmp_path: Path
) -> None:
    write_model(tmp_path / "small", vocab_size=290)
    write_tokenizer(tmp_path / "small")
    error = refused(run_folder(model=tmp_path / "small"))
    assert "300 ids" in str(error) and "290" in str(error)
    assert error.hint  # type: ignore[union-attr]


def test_a_tokenizer_with_more_ids_than_a_text_tower_is_refused(
    run_folder: Make, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "small")
    text = {"model_type": "gemma3_text", "vocab_size": 290}
    config = {"model_type": "gemma3", "text_config": text}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    assert "300 ids" in str(refused(run_folder(model=tmp_path / "small")))


def test_a_template_whose_stop_token_this_tokenizer_lacks_is_refused(run_folder: Make) -> None:
    job = run_folder()
    settings = json.loads(job.read_text())
    settings["data"] |= {
        "template": "mine",
        "template_text": 'user = "U: {user} A:"\nassistant = "{assistant}"\nstop = '
        '"<|end_of_turn|>"',
    }
    job.write_text(json.dumps(settings))
    assert "is" in str(refused(job)) and "eos" in str(refused(job))


def test_an_unknown_target_module_names_the_close_ones(run_folder: Make) -> None:
    outcome = outcome_of(run_folder(lora={"target_modules": ["q_proj", "v_porj"]}))
    assert outcome.code == 3 and "'v_porj'" in str(outcome.error) and "v_proj" in str(outcome.error)


def test_a_precision_that_this_device_lacks_is_refused(run_folder: Make) -> None:
    job = run_folder()
    settings = json.loads(job.read_text())
    settings["model"]["precision"] = "fp8"
    job.write_text(json.dumps(settings))
    outcome = outcome_of(job)
    assert outcome.code == 3 and 'model.precision = "fp32"' in str(outcome.error)


def test_data_that_changed_since_the_job_was_made_is_refused(run_folder: Make) -> None:
    job = run_folder()
    with open(job.parent / "data" / "train.jsonl", "a") as file:
        file.write('{"instruction": "late", "output": "row"}\n')
    assert "sha256" in str(refused(job))


def test_a_special_token_written_out_in_a_text_is_refused(run_folder: Make) -> None:
    error = refused(
        run_folder(data=[*rows(3), {"instruction": "close </s> it", "input": "", "output": "done"}])
    )
    assert "'</s>'" in error.samples[0] and "train.jsonl:4" in error.samples[0]


@pytest.mark.parametrize("where", ["call", "name of a tool", "description of a tool"])
def test_a_special_token_written_out_in_a_tool_is_refused(run_folder: Make, where: str) -> None:
    spelled, call = "close </s> it", {"name": "w", "arguments": {}}
    tool = {"name": "w", "description": spelled if where.startswith("desc") else "d"}
    result = {"role": "tool", "content": "1", "name": spelled if where.startswith("name") else "w"}
    if where == "call":
        call["arguments"] = {"x": [spelled]}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        result,
        {"role": "assistant", "content": "b"},
    ]
    row = {"messages": turns, "tools": [tool]}
    error = refused(run_folder(data=[row]))
    assert "'</s>'" in error.samples[0]


def test_a_model_folder_without_a_fast_tokenizer_is_refused(
    run_folder: Make, models: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    assert "tokenizer.json" in str(refused(run_folder(model=tmp_path / "bare")))


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
    assert (
        prepared(job).rows.ids.tolist() != first.ids.tolist()
        and len(list((job.parent / "cache").glob("*.safetensors"))) == 2
    )


# -- the model's files, before torch ---------------------------------------------------------------


@pytest.fixture
def folder(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A model's folder that may be spoiled."""
    shutil.copytree(models(), tmp_path / "base")
    return tmp_path / "base"


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, word: str) -> None:
    """Takes the tensors with `word` in their names out of the weights."""
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if word not in k}, path)


def test_a_sound_model_folder_passes(folder: Path) -> None:
    validate_weights(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "may run code"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "no model_type"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "not a whole safetensors file"),
        (lambda f: shutil.rmtree(f), "not in the run folder"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda f: (f / "model.safetensors").rename(f / "x.safetensors"), "neither"),
        (lambda f: configure(f, num_hidden_layers=3), "tells of 3 layers, the weights are of 2"),
        (lambda f: without(f, "lm_head"), "no output layer"),
    ],
)
def test_a_model_folder_that_cannot_be_loaded_is_refused_with_what_to_do(
    folder: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(folder)
    with pytest.raises(InvalidJob, match=said) as caught:
        validate_weights(folder)
    assert caught.value.hint


def test_a_tensor_that_the_weights_lack_is_named_and_not_made_up(
    run_folder: Make, folder: Path
) -> None:
    without(folder, "layers.1.mlp.up_proj")
    outcome = outcome_of(run_folder(model=folder))
    assert outcome.code == 3 and "model.layers.1.mlp.up_proj.weight" in str(outcome.error)


def test_float8_without_its_scales_is_refused_and_with_them_is_not(folder: Path) -> None:
    import torch
    from safetensors import torch as files

    path, fp8 = folder / "model.safetensors", torch.float8_e4m3fn
    held = files.load_file(path)
    names = [name for name in held if name.endswith("up_proj.weight")]
    cast = held | {name: held[name].to(fp8) for name in names}
    files.save_file(cast, path, metadata={"format": "pt"})
    with pytest.raises(InvalidJob, match="float8, without the scales") as caught:
        validate_weights(folder)
    assert names[0] in str(caught.value) and caught.value.hint
    scales = {f"{name}_scale_inv": torch.ones(1) for name in names}
    files.save_file(cast | scales, path, metadata={"format": "pt"})
    validate_weights(folder)


def test_what_transformers_does_not_understand_is_refused_in_words(
    run_folder: Make, folder: Path
) -> None:
    configure(folder, hidden_act="foo")
    outcome = outcome_of(run_folder(model=folder))
    assert outcome.code == 3 and "transformers cannot load model/ (KeyError: 'foo')" in str(
        outcome.error
    )


def test_a_shard_that_the_index_names_and_nobody_pushed_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        InvalidJob, match=r"1 of 2 files of weights: model-00002-of-00002\.safetensors"
    ):
        validate_weights(folder)


def test_a_vocabulary_that_is_not_the_weights_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": config["vocab_size"] + 7})
    )
    with pytest.raises(InvalidJob, match="do not belong together") as caught:
        validate_weights(folder)
    assert str(config["vocab_size"]) in caught.value.hint


def test_a_method_that_a_precision_cannot_serve_is_refused_without_torch(run_folder: Make) -> None:
    job = run_folder(training={"method": "full"})
    settings = json.loads(job.read_text())
    settings["model"]["precision"] = "nf4"
    job.write_text(json.dumps(settings))
    assert "cannot hold" in str(refused(job))


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_begins_from_the_base_is_refused_in_int8(
    run_folder: Make, lora: dict[str, Any]
) -> None:
    job = run_folder(lora=lora)
    job.write_text(job.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    error = refused(job)
    assert isinstance(error, InvalidJob) and "nf4" in error.hint
    assert f"lora.{next(iter(lora))}" in str(error)


def test_a_template_with_an_empty_stop_token_is_refused(run_folder: Make) -> None:
    job = run_folder()
    settings = json.loads(job.read_text())
    settings["data"] |= {
        "template": "mine",
        "template_text": 'user = "U: {user} A:"\nassistant = "{assistant}"\nstop = ""',
    }
    job.write_text(json.dumps(settings))
    assert "no stop token" in str(refused(job)) and "eos" in str(refused(job))


def test_the_refusal_of_long_rows_says_how_long_the_longest_is(run_folder: Make) -> None:
    error = refused(limited(run_folder, "refuse"))
    samples = error.samples  # type: ignore[union-attr]
    longest = max(int(sample.split(": ")[1].split()[0]) for sample in samples)
    hint = error.hint  # type: ignore[union-attr]
    assert longest > 260 and f"data.max_length to {longest} " in hint
    again = refused(limited(run_folder, "truncate"))
    assert '"truncate"' not in again.hint  # type: ignore[union-attr]


def test_a_thousand_bad_rows_do_not_fill_the_terminal_and_are_all_in_the_events(
    run_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run_folder(data=[*rows(4), *({"instruction": "a"} for _ in range(1000))])
    with pytest.raises(InvalidJob) as caught:
        prepared(job)
    assert report_refusal(job.parent, caught.value) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 50 and "1000 defects" in lines[0] and "960 more" in lines[-2]
    assert len(json.loads((job.parent / "events.jsonl").read_text())["samples"]) == 1000


def test_a_fault_in_the_job_file_is_told_by_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text(
        '{"run_id": "abc", "model": {"base": "x"}, "data": {"files": []}, "training": '
        '{"learnin_rate": 1}}'
    )
    assert launch([str(tmp_path / "job.json")]) == 3
    told = capsys.readouterr().err
    assert "job.json: training.learnin_rate:" in told and "pydantic" not in told


# -- conversations ---------------------------------------------------------------------------------


def chat_job(make: Make, folder: Path, data: list, name: str = "qwen3", **settings: object) -> Path:
    """A job on one of the chat templates of models."""
    job = make(model=write_model_tokenizer(folder / name, name), data=data)
    told = json.loads(job.read_text())
    told["data"] |= {"template": "chat", **settings}
    job.write_text(json.dumps(told))
    return job


def conversation(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_two_turns_with_qwen3s_own_template_train_as_two_examples_and_the_plan_is_told(
    run_folder: Make, tmp_path: Path
) -> None:
    job = chat_job(run_folder, tmp_path, [conversation("Hi", "Hello", "Bye", "See you")] * 3)
    for _ in range(2):  # the second time from the cache
        found = prepared(job)
        assert len(found.rows) == 6 and found.rows.thinking is False
        assert [line[:1] for line in found.rows.summary] == ["3", "n"]
        assert "3 conversations became 6 examples" in found.rows.summary[0]
        assert "no row has reasoning" in found.rows.summary[1]
        asked = prompt_ids(found, [Turn("user", "Hi")])
        assert found.rows.ids[: len(asked)].tolist() == asked


def test_train_on_last_and_enable_thinking_are_settings_of_the_job(
    run_folder: Make, tmp_path: Path
) -> None:
    rows = [conversation("Hi", "Hello", "Bye", "See you")]
    job = chat_job(run_folder, tmp_path, rows, train_on="last", enable_thinking=True)
    found = prepared(job)
    text = found.vocabulary.tokenizer.decode(found.rows.ids, skip_special_tokens=False)
    assert len(found.rows) == 1 and found.rows.thinking is True
    assert text.endswith("assistant\n<think>\n\n</think>\n\nSee you<|im_end|>\n")


def test_a_flag_that_no_template_reads_is_refused(run_folder: Make) -> None:
    for template in ("alpaca", "chat"):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
        job = run_folder(data=[{"messages": turns}])
        settings = json.loads(job.read_text())
        settings["data"] |= {"template": template, "enable_thinking": True}
        job.write_text(json.dumps(settings))
        error = refused(job)
        assert "data.enable_thinking" in str(error) and "no such flag" in str(error)


def test_an_empty_block_of_reasoning_that_is_learned_is_told(
    run_folder: Make, tmp_path: Path
) -> None:
    rows = [conversation("Hi", "Hello")]
    found = prepared(chat_job(run_folder, tmp_path, rows, "qwen3_8", enable_thinking=True))
    assert "close it, empty" in found.rows.summary[0]


def test_a_text_that_ends_with_the_end_token_gets_no_second_one(
    run_folder: Make, tmp_path: Path
) -> None:
    rows = [{"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"}]
    found = prepared(chat_job(run_folder, tmp_path, rows)).rows
    end = found.ids[-1]
    assert found.ids.tolist().count(end) == 2 and found.ids[-2] != end


def test_held_out_rows_that_the_template_cannot_ask_are_refused_before_training(
    run_folder: Make,
) -> None:
    call = {"type": "function", "function": {"name": "w", "arguments": {}}}
    asked = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains"},
    ]
    job = run_folder(data=rows(4), held_out=[{"messages": asked}])
    error = refused(job)
    assert "1 of 1 held-out rows" in str(error) and "no place for tool calls" in error.samples[0]


def test_a_stop_token_at_which_no_server_stops_is_told(run_folder: Make, tmp_path: Path) -> None:
    job = chat_job(run_folder, tmp_path, [conversation("Hi", "Hello")])
    (job.parent / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert "generation_config.json stops no answer" in prepared(job).rows.summary[-1]
    (job.parent / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert "generation_config" not in "".join(prepared(job).rows.summary)


def test_the_plan_asks_for_the_cards_that_the_trainer_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from ops.hardware.gpus import GPUS, MIN_COMPUTE_CAPABILITY, MIN_WHERE_NAMED
    from trainer.model.load import validate_precision
    from trainer.model.parts import ModelError

    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    for known in sorted({gpu.compute_capability for gpu in GPUS}):
        major, minor = map(int, f"{known:.1f}".split("."))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, x=(major, minor): x)
        for precision, least in MIN_WHERE_NAMED.items():
            assert least <= MIN_COMPUTE_CAPABILITY[precision]
            if known >= least:
                validate_precision(precision, card)
            else:
                with pytest.raises(ModelError, match=f"precision {precision} needs"):
                    validate_precision(precision, card)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_card_before_ampere_is_told_what_it_can_compute_in(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from trainer.model.load import validate_precision
    from trainer.model.parts import ModelError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(ModelError, match=r'Tesla T4 has 7\.5: set model\.precision = "fp16"'):
        validate_precision(precision, torch.device("cuda"))
    for served in ("fp16", "nf4", "int8", "fp32"):
        validate_precision(served, torch.device("cuda"))


def test_a_family_that_overflows_is_refused_where_fp16_is_computed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from trainer import families
    from trainer.model.load import validate_half
    from trainer.model.parts import ModelError

    card, host = torch.device("cuda"), torch.device("cpu")
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2}
    gemma = families.read({"model_type": "gemma3", "text_config": text})
    llama = families.read({"model_type": "llama", "num_hidden_layers": 2})
    for capability, refused in (((7, 5), ("fp16", "nf4", "int8")), ((8, 0), ("fp16",))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, x=capability: x)
        for precision in ("fp32", "fp16", "nf4", "int8"):
            validate_half(llama, precision, card)
            if precision not in refused:
                validate_half(gemma, precision, card)
                continue
            with pytest.raises(ModelError, match="is not computed in fp16"):
                validate_half(gemma, precision, card)
    validate_half(gemma, "nf4", host)
