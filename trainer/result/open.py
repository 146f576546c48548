"""A finished adapter on its base model, ready to answer.

The template and the token hash that travel in template.json are compared with what the base's
tokenizer makes of them now: where they differ, prompts would differ from those of the training, and
nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainer.data.errors import InvalidJob
from trainer.data.files import read_rows
from trainer.data.formats import Row
from trainer.data.prepare import (
    Prepared,
    hub_folder,
    model_folder,
    prompt_ids,
    reading_of,
    validate_rows,
)
from trainer.data.render import examples
from trainer.data.sources import Reading
from trainer.data.template import TemplateError, Turn, from_chat_template, parse
from trainer.data.tokenised import Rows
from trainer.data.tokens import open_vocabulary, stop_token, token_hash
from trainer.kernels.attention import register
from trainer.kernels.backend import half
from trainer.kernels.rotary import by_document
from trainer.model.answering import (
    accelerate,
    answers_fast,
    attach_experts,
    held_by_kernels,
    hold,
)
from trainer.model.decode import answer
from trainer.model.load import family_in
from trainer.model.parts import ModelError
from trainer.model.prompts import validate_family
from trainer.result.adapter import merged_defect
from trainer.wire.job import Job
from trainer.wire.prompts import PEFT_TYPES

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "bf16", "fp8", "int8", "nf4")
QUANTISED = ("fp8", "int8", "nf4")
NO_ANSWERS = ("rm", "dpo", "kto")  # stages whose rows say which of answers is the better one
TEXTS = 64  # texts of the user's own in a certificate
NF4_BLOCK = 64  # weights of one scale


@dataclass
class Chat:
    """A model ready to answer. `ask` keeps the conversation where the template has turns for it."""

    model: nn.Module
    data: Prepared
    device: torch.device
    turns: list[Turn]

    def ask(self, question: str, extra: str = "", new_tokens: int = 512) -> str:
        """The greedy answer to `question`; `extra` is Alpaca's input."""
        self.turns.append(Turn("user", question, extra))
        text = answer(
            self.model, [prompt_ids(self.data, self.turns)], self.data, self.device, new_tokens
        )[0]
        self.turns.append(Turn("assistant", text))
        return text


def open_adapter(adapter: Path, base: Path, device: torch.device | None = None) -> Chat:
    """Loads base and adapter through stock PEFT. Raises TemplateError when template and tokenizer
    are not those of the training, ModelError when the folder is no result of this trainer."""
    device = device or here()
    data = open_words(adapter, base)
    return Chat(load_model(adapter, base, device), data, device, [])


def open_words(adapter: Path, base: Path) -> Prepared:
    """What renders questions for the result, without rows and without the model. Raises
    TemplateError and ModelError as `open_adapter`."""
    if not (adapter / "template.json").is_file():
        raise ModelError(
            f"{adapter.name}/ has no template.json: give the folder that adapter.zip was "
            "unpacked to"
        )
    config = adapter / "adapter_config.json"
    if config.is_file() and json.loads(config.read_bytes()).get("task_type") == "SEQ_CLS":
        raise ModelError(
            "this is a reward model: it scores conversations and answers nothing; its card says "
            "how to ask it"
        )
    if defect := merged_defect(adapter, base):
        raise ModelError(defect)
    saved = json.loads((adapter / "template.json").read_text(encoding="utf-8"))
    vocabulary = open_vocabulary(base)
    template = (
        from_chat_template(saved["source"])
        if saved["name"] == "chat"
        else parse(saved["name"], saved["source"])
    )
    found = token_hash(vocabulary, template)
    if found != saved["token_hash"]:
        raise TemplateError(
            f"the template {saved['name']} becomes other tokens here (hash {found[:12]}) than "
            f"in training ({saved['token_hash'][:12]}): "
            f"{base.name}/ is not the base, or not the tokenizer, that the adapter was trained with"
        )
    rows = replace(Rows.empty(), thinking=saved.get("enable_thinking"))
    return Prepared(rows, vocabulary, template, stop_token(vocabulary, template), found)


def base_folder(named: str) -> Path:
    """The folder of a base model: `named` is a folder, or a hub id (ID@REVISION), which is fetched
    where the hub's cache has it not. Raises ModelMissing, ModelError."""
    path = Path(named).expanduser()
    if path.is_dir():
        return path
    base, _, revision = named.partition("@")
    if path.is_absolute() or named.startswith(("./", "../", "~")) or named.count("/") != 1:
        raise ModelError(
            f"there is no folder {named}: give --base the base model's folder, or its id on the "
            "hub (such as Qwen/Qwen2.5-0.5B)"
        )
    return hub_folder(base, revision or None, weights=True)


def load_model(
    adapter: Path | None, base: Path, device: torch.device, precision: str = "auto"
) -> nn.Module:
    """The base with the adapter on it, or the whole model that `adapter` is, or the base alone, in
    one of PRECISIONS."""
    if adapter is None:
        return load_answering(base, device, precision)
    if not (adapter / "adapter_config.json").is_file():  # full or freeze: a whole model
        return load_answering(adapter, device, precision)
    # a learned prompt is computed by transformers' layers
    fast = False if is_prompt(adapter) else None
    adapt = partial(with_adapter, adapter=adapter)
    return load_answering(base, device, precision, adapt, fast)


def load_answering(
    folder: Path,
    device: torch.device,
    precision: str = "auto",
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model,
    fast: bool | None = None,
) -> nn.Module:
    """The model of a folder with the adapters that `adapt` puts on it, in one of PRECISIONS, ready
    to answer. `fast`: its layers are computed by trainer/kernels where they compute such a model;
    None: on an NVIDIA GPU. Raises ModelError for what the precision does not serve."""
    precision = precision_of(precision, folder, device)
    validate_device(precision, device)
    fast = answers_fast(device, precision) if fast is None else fast
    alone = held_by_kernels(family_in(folder), precision)
    if fast or alone:
        held = "fp32" if precision == "fp32" else "bf16"
        if alone:
            held = precision_of("auto", folder, device)
        model = adapt(load_plain(folder, device, held, on_cpu=True))
        attach_experts(model)
        if fast and accelerate(model, precision, device):
            return model.eval()
        if alone:
            return hold(model, precision, device).eval()
        if precision == held:
            return model.to(device).eval()
        del model
    model = adapt(load_plain(folder, device, precision))
    attach_experts(model)
    return model.eval()


def validate_device(precision: str, device: torch.device) -> None:
    """Raises ModelError for FP8 where no card computes it."""
    if precision != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(
            "fp8 needs an NVIDIA GPU of compute capability 8.9 or more: --precision nf4 or bf16"
        )


def with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """A base with the adapter of a folder on it, by PEFT. Raises ModelError for a learned prompt
    that does not go with it."""
    if is_prompt(adapter):
        validate_family(model)
    made: Any = PeftModel.from_pretrained(model, str(adapter))
    return cast(nn.Module, made.eval())


def is_prompt(adapter: Path) -> bool:
    """Whether a folder holds a learned prompt of PEFT's."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        return False
    return json.loads(config.read_bytes()).get("peft_type") in PEFT_TYPES.values()


def load_plain(
    folder: Path, device: torch.device, precision: str = "auto", on_cpu: bool = False
) -> nn.Module:
    """A model folder by transformers with our attention, in one of PRECISIONS but fp8; for bf16
    fp16 on a GPU that has none, but of families that it does not serve. `on_cpu`: what goes to
    `device` later."""
    register()
    precision = precision_of(precision, folder, device)
    family = family_in(folder)  # of the model as it was published
    two_bytes = torch.bfloat16 if family.why_no_fp16() else half(precision, device)
    quantised = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else two_bytes,
        ),
    }.get(precision)
    more = {"quantization_config": quantised, "device_map": {"": device}} if quantised else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if precision == "fp32" else two_bytes,
        attn_implementation="milktea",
        **more,
    )
    if precision == "nf4" and device.type == "cpu":
        _validate_widths(model)
    model.family = family
    by_document(model)
    return cast(nn.Module, (model if quantised or on_cpu else model.to(device)).eval())


def _validate_widths(model: nn.Module) -> None:
    """Raises ModelError for a width that bitsandbytes does not hold in nf4 on a CPU."""
    for name, module in model.named_modules():
        width = getattr(module, "in_features", 0)
        if type(module).__name__ == "Linear4bit" and width % NF4_BLOCK:
            raise ModelError(
                f"{name} has {width} inputs, and on a CPU nf4 takes multiples of {NF4_BLOCK} "
                "alone: --precision int8 or bf16"
            )


def here() -> torch.device:
    """The device of this machine that computes answers."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(named: str) -> torch.device:
    """The device for one of DEVICES; auto is a GPU where there is one. Raises ModelError for one
    that is not there."""
    apple = torch.backends.mps.is_available()
    if named == "auto":
        return torch.device("mps") if apple and not torch.cuda.is_available() else here()
    if {"cuda": not torch.cuda.is_available(), "mps": not apple}.get(named):
        raise ModelError(f"torch finds no {named} on this machine: --device cpu")
    return torch.device(named)


def precision_of(named: str, folder: Path, device: torch.device) -> str:
    """One of PRECISIONS; auto is bf16 on a GPU, and on a CPU fp32 where memory has room for it."""
    if named != "auto":
        return named
    if device.type != "cpu":
        return "bf16"
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return "fp32" if 2 * held < psutil.virtual_memory().available else "bf16"


def precision_of_job(job: Job, device: torch.device) -> str:
    """The one of PRECISIONS in which a job's result is asked where nobody says one: on a GPU that
    in which its base was quantised, since the GPU may hold no other."""
    quantised = device.type == "cuda" and job.model.precision in QUANTISED
    return job.model.precision if quantised else "auto"


def rows_in(file: Path, job: Path | None = None) -> list[Row]:
    """The rows of a file, read as the job (a job.json) says where it is like the job's files, else
    as files of its layout are read. Raises InvalidJob with each defect."""
    told = Job.model_validate_json(job.read_bytes()) if job is not None else None
    readings = [reading_of(told.data)] if told is not None else []
    found = []
    for reading in [*readings, Reading()]:
        rows, defects = read_rows([(file, file.name)], reading)
        if rows and not defects:
            return rows
        found.append((rows, defects))
    rows, defects = found[0]
    validate_rows(defects)
    return rows


def result_of_run(run: Path) -> tuple[Job, Path]:
    """(its job, its adapter.zip) of a run folder. Raises InvalidJob where no result is finished."""
    if not (run / "result" / "manifest.json").is_file():
        raise InvalidJob(
            f"{run.name} has no finished result",
            hint=f"milktea-run train JOB.toml --run {run.name} goes on with it",
        )
    told = Job.model_validate_json((run / "job.json").read_bytes())
    return told, run / "result" / "adapter.zip"


def base_of_result(job: Job, run: Path) -> Path:
    """The folder of the model on which the finished result of a run folder stands: the job's base,
    or what its last stage made of it by merging adapters in. Raises ModelMissing."""
    part, folder = job.parts()[-1]
    if part.merged:
        return run / folder / part.merged_base
    return model_folder(job, run, weights=True)


def texts_of(
    adapter: Path, base: Path, file: Path, job: Path | None = None, most: int = TEXTS
) -> list[str]:
    """The first `most` rows of `file`, question and answer as the adapter was trained on them.
    Raises InvalidJob for rows that cannot be read, TemplateError."""
    rows = rows_in(file, job)
    data = open_words(adapter, base)
    tokens, flag = data.vocabulary.special_tokens, data.rows.thinking
    texts = [row.text for row in rows[:most] if row.text]
    for row in rows[:most]:
        if row.turns:
            made = examples(data.template, row.turns, tokens, tools=row.tools, thinking=flag)
            texts += ["".join(segment.text for segment in example.segments) for example in made]
    return texts
