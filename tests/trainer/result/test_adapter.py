"""What comes out: loads in stock PEFT, computes what was trained, and answers with the template
that travelled along. Every method learns."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import manifest_of, rows, write_model

from trainer.data import batch
from trainer.data.prepare import prepare
from trainer.data.template import TemplateError
from trainer.model.forward import target_loss
from trainer.result import adapter
from trainer.result.adapter import ResultError, compare
from trainer.result.open import open_adapter
from trainer.train import run_job
from trainer.wire.digest import sha256_of
from trainer.wire.job import Job

Make = Callable[..., Path]
CPU = torch.device("cpu")
PLAIN_LORA = {"lora": {"r": 16, "lora_alpha": 32}}  # as where it is left out
METHODS = {
    "lora": {},
    "rslora": {"lora": {"use_rslora": True}},
    "dora": {"lora": {"use_dora": True}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}, "training": {"learning_rate": 2e-3}},
    "gaussian": {"lora": {"init_lora_weights": "gaussian"}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "two modules": {
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "training": {"learning_rate": 2e-2},
    },
    "full": {"training": {"method": "full", "learning_rate": 1e-3}},
    "p_tuning_v2": {"training": {"method": "p_tuning_v2", "learning_rate": 5e-2}, **PLAIN_LORA},
    "prompt_tuning": {"training": {"method": "prompt_tuning", "learning_rate": 5e-2}, **PLAIN_LORA},
    "freeze": {
        "training": {"method": "freeze", "freeze_trainable_layers": 1, "learning_rate": 3e-3}
    },
}


def unpacked(job: Path) -> Path:
    folder = job.parent / "adapter"
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        archive.extractall(folder)
    return folder


def loss_of(model: torch.nn.Module, job: Path) -> float:
    data = prepare(Job.model_validate_json(job.read_bytes()), job.parent).rows
    with torch.no_grad():
        return float(target_loss(model.eval(), batch.packed(data, range(len(data)), CPU))) / sum(
            data.targets()
        )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_and_stock_libraries_load_what_it_learned(
    run_folder: Make, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained: list[float] = []
    real = adapter.write_result

    def look(root: Path, model: torch.nn.Module, *more: object) -> str:
        trained.append(loss_of(model, job))
        return real(root, model, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter, "write_result", look)
    settings = METHODS[method]
    job = run_folder(
        **settings, **({} if "training" in settings else {"training": {"num_train_epochs": 4}})
    )
    assert run_job(job) == 0
    curve = [x for _, x in manifest_of(job)["curve"]]
    assert curve[-1] < curve[0] - 0.1
    folder = unpacked(job)
    if method in ("full", "freeze"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="milktea", dtype=torch.float32
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(
            job.parent / "model", attn_implementation="milktea", dtype=torch.float32
        )
        model = PeftModel.from_pretrained(base, str(folder))
    assert ("PeftModel.from_pretrained" in (folder / "README.md").read_text()) == (
        method not in ("full", "freeze")
    )
    assert loss_of(model, job) == pytest.approx(trained[0], abs=1e-5)
    assert trained[0] < curve[0]


@pytest.mark.parametrize("precision", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_base_quantised_by_bitsandbytes_learns_on_its_cpu_backend(
    run_folder: Make, tmp_path: Path, precision: str
) -> None:
    # on a CPU with AVX512-BF16 bitsandbytes takes no row shorter than a block of scales
    write_model(tmp_path / "wide", hidden_size=64)
    job = run_folder(model=tmp_path / "wide", training={"num_train_epochs": 4})
    settings = json.loads(job.read_text())
    settings["model"]["precision"] = precision
    job.write_text(json.dumps(settings))
    assert run_job(job) == 0
    curve = [x for _, x in manifest_of(job)["curve"]]
    assert curve[-1] < curve[0] - 0.1
    assert manifest_of(job)["kernels"]["layer"].endswith(f"{precision})")


def test_a_file_that_is_not_what_was_trained_is_refused(tmp_path: Path) -> None:
    good = {"a.lora_A.weight": torch.randn(2, 3), "a.lora_B.weight": torch.randn(3, 2)}
    path = tmp_path / "adapter_model.safetensors"
    changes: list[Callable[[dict], object]] = [
        lambda t: t.pop("a.lora_A.weight"),
        lambda t: t.update(extra=torch.ones(1)),
        lambda t: t["a.lora_A.weight"].add_(1),
        lambda t: t["a.lora_B.weight"].fill_(float("nan")),
    ]
    for change in changes:
        held = {k: v.clone() for k, v in good.items()}
        change(held)
        save_file(held, path)
        with pytest.raises(ResultError):
            compare(path, good)
    zeros = good | {"a.lora_B.weight": torch.zeros(3, 2)}
    save_file(zeros, path)
    with pytest.raises(ResultError, match="still zero"):
        compare(path, zeros)
    save_file(good, path)
    assert compare(path, good)["a.lora_A.weight"] == {"shape": [2, 3], "dtype": "float32"}


def test_the_manifest_holds_what_is_needed_to_trust_and_repeat_the_run(run_folder: Make) -> None:
    job = run_folder(training={"max_steps": 3})
    assert run_job(job) == 0
    manifest, settings = manifest_of(job), json.loads(job.read_text())
    folder = unpacked(job)
    assert manifest["data_sha256"] == [f["sha256"] for f in settings["data"]["files"]]
    assert manifest["lora"]["r"] == 4 and manifest["steps"] == 3 and len(manifest["curve"]) == 3
    assert {"torch", "transformers", "peft", "python"} <= set(manifest["versions"]) and manifest[
        "kernels"
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {k: list(v.shape) for k, v in tensors.items()} == {
        k: v["shape"] for k, v in manifest["tensors"].items()
    }
    for name, facts in manifest["members"].items():
        assert (
            sha256_of(folder / name) == facts["sha256"]
            and (folder / name).stat().st_size == facts["bytes"]
        )
    # weights hardly shrink, and a box waits for it
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        assert archive.getinfo("adapter_model.safetensors").compress_type == zipfile.ZIP_STORED
    told = json.loads((folder / "template.json").read_text())
    assert (
        told["token_hash"] == manifest["template"]["token_hash"]
        and "### Instruction" in told["source"]
    )


@pytest.mark.slow
def test_generation_uses_the_template_that_travelled_and_gives_the_trained_answer(
    run_folder: Make,
) -> None:
    data = [
        {"instruction": f"say {w}", "input": "", "output": f"{w} it is"}
        for w in ("tea", "milk", "rice")
    ] * 8
    job = run_folder(data=data, training={"num_train_epochs": 25, "learning_rate": 1e-2})
    assert run_job(job) == 0
    folder = unpacked(job)
    chat = open_adapter(folder, job.parent / "model")
    assert [chat.ask(f"say {w}") if not chat.turns.clear() else "" for w in ("tea", "rice")] == [
        "tea it is",
        "rice it is",
    ]


def test_an_adapter_is_not_asked_in_words_that_it_never_saw(
    run_folder: Make, tmp_path: Path
) -> None:
    job = run_folder(training={"max_steps": 2})
    assert run_job(job) == 0
    folder = unpacked(job)
    shutil.copytree(job.parent / "model", tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(
        text.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        )
    )
    with pytest.raises(TemplateError, match="other tokens"):
        open_adapter(folder, tmp_path / "other")


def test_the_report_shows_answers_and_escapes_them(run_folder: Make) -> None:
    job = run_folder(
        held_out=[{"instruction": "<b>bold</b>", "input": "", "output": "x"}, *rows(1)],
        training={"max_steps": 2},
    )
    assert run_job(job) == 0
    page = (job.parent / "result" / "report.html").read_text()
    assert (
        "&lt;b&gt;bold" in page
        and "<b>bold" not in page
        and "<polyline" in page
        and "http" not in page.replace("http-equiv", "")
    )
    assert (job.parent / "result" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_stock_transformers_asks_and_stops_as_the_training_did(run_folder: Make) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = run_folder(training={"num_train_epochs": 12, "learning_rate": 1e-2})
    assert run_job(job) == 0
    folder = unpacked(job)
    ours = open_adapter(folder, job.parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(job.parent / "model", dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, str(folder)).eval()
    stock.generation_config = type(stock.generation_config).from_pretrained(folder)
    ended = 0
    for row in rows(50):
        ours.turns.clear()
        message = {"role": "user", "content": row["instruction"], "input": row.get("input", "")}
        ids = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            told = stock.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        answer = ours.ask(row["instruction"], row.get("input", ""), 24)
        assert tokenizer.decode(told, skip_special_tokens=True).strip() == answer
        ended += int(told[-1]) == ours.data.stop_id
    assert ended > 10
    manifest = manifest_of(job)
    assert manifest["chat_template"]["conversations"] == 1000


def test_an_rslora_is_written_as_a_plain_one(run_folder: Make) -> None:
    job = run_folder(lora={"use_rslora": True, "r": 4}, training={"num_train_epochs": 1})
    assert run_job(job) == 0
    config = json.loads((unpacked(job) / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == json.loads(job.read_text())["lora"]["lora_alpha"]
